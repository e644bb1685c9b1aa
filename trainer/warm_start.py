"""Where a new run's weights come from, if not from the seed: the section ``init`` of the configuration.

A run that goes on has its weights from its own checkpoint, and never comes here.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoint import load_head, read_rows, read_tensors
from trainer.class_means import centroids_at, class_means
from trainer.config import Config
from trainer.distributed import World
from trainer.engine import set_weights
from trainer.errors import UserError
from trainer.feed import TrainingData
from trainer.log import log
from trainer.state import TrainState
from trainer.trained import backbone_weights, open_trained


def warm_start(state: TrainState, config: Config, data: TrainingData, world: World) -> None:
    """Set the weights of ``state`` as ``config.init`` says; every rank must call it. Raises UserError."""
    source = config.init.from_
    if source is not None:
        set_weights(state.engine, weights_for(state.engine.module, source))
        log.info("the backbone begins with the weights of %s", source)
        if config.init.head:
            _load_rows(state, source, data)
            log.info("the head begins with the rows of %s", source)
    if config.init.centroids == "class_means":
        set_class_means(state, config, data, world)


def weights_for(backbone: nn.Module, source: Path) -> dict[str, Tensor]:
    """Return the weights of a run, a checkpoint or a safetensors file by their names in ``backbone``.

    A file of timm's has neither our neck, which then stays as it is, nor may it lack anything else; its
    classifier is left out. Raises UserError for any other difference of names or shapes.
    """
    expected = {name: value.shape for name, value in backbone.state_dict().items()}
    if source.is_dir():
        weights = backbone_weights(open_trained(source).read_backbone())
    else:
        weights = read_tensors(source)
        if any(name.startswith("parameter.") for name in weights):
            weights = backbone_weights(weights)
        elif not any(name.startswith("network.") for name in weights):
            weights = _without_classifier(weights, backbone)
            expected = {name: shape for name, shape in expected.items() if not name.startswith("neck.")}
            log.info("init.from: %s is timm's and has no neck: it stays random", source)
    for name in sorted(expected.keys() | weights.keys()):
        there, here = weights[name].shape if name in weights else None, expected.get(name)
        if there != here:
            raise UserError(f"init.from: {source}: {name} is {_shape(there)} there and {_shape(here)} here")
    return weights


@torch.no_grad()
def set_class_means(state: TrainState, config: Config, data: TrainingData, world: World) -> None:
    """Point rows to the mean features of their classes; those without images stay random. Collective.

    Centres of raw distances stay random, too: they are places, and the first steps move them there.
    """
    if data.index is None:
        raise UserError("init.centroids: class_means needs data.reader=indexed, got stream")
    matrices = state.head.rows_by_angle()  # a sum of losses may have several
    state.engine.eval()
    means_CD, counts_C = class_means(
        state.engine, data.index, state.head.shard, matrices[0].shape[1], config, world
    )
    state.engine.train()
    sub_centroids = config.head.sub_centroids
    new_CD = centroids_at(means_CD, sub_centroids, config.seed, state.head.shard)
    has_images_C = (counts_C > 0).repeat_interleave(sub_centroids)
    for rows_CD in matrices:
        rows_CD[has_images_C] = new_CD[has_images_C].to(rows_CD.dtype)
    log.info("centroids begin as the mean features of %d images", data.num_samples)


def _load_rows(state: TrainState, source: Path, data: TrainingData) -> None:
    """Set the rows of the same classes; their optimizer begins anew."""
    if not source.is_dir():
        raise UserError(f"init.head: {source} is a file of a backbone; name a run or a checkpoint")
    trained = open_trained(source)
    for label, (there, here) in enumerate(zip(trained.class_names, data.class_names, strict=False)):
        if there != here:
            raise UserError(
                f"init.head: {source}: class {label} is {there!r} there and {here!r} here; "
                "launch/classes.py makes a checkpoint for other classes"
            )
    rows = read_rows(trained.path, state.head.row_shard)
    for name, parameter in state.head.named_parameters():
        found = rows.get(f"parameter.{name}")
        if found is None or found.shape != parameter.shape:
            shape = _shape(None if found is None else found.shape)
            raise UserError(
                f"init.head: {source}: {name} is {shape} there and {_shape(parameter.shape)} here"
            )
    load_head(state.head, None, rows)


def _without_classifier(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return a timm file's weights under our names, without those of the classifier timm knows."""
    network = backbone.get_submodule("network")
    classifiers = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    return {f"network.{name}": value for name, value in weights.items() if not name.startswith(prefixes)}


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else str(list(size))
