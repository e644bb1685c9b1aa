"""Combinations of options that cannot work: refused before anything is started, in one line each."""

from collections.abc import Mapping
from typing import Any

from trainer.address import Url
from trainer.config import ROWLESS, UNFUSED, Config
from trainer.errors import UserError

_WITHOUT_ANGLES = ROWLESS | {"center", "standalone_center"}


def check_across_fields(config: Config) -> None:
    """Refuse combinations that no single field can see. Raises UserError."""
    _check_schedule_and_engine(config)
    _check_weights_and_pixels(config)
    _check_data(config)
    _check_test_sets(config)
    _check_losses(config)
    _check_head(config)


def _check_schedule_and_engine(config: Config) -> None:
    optim, engine = config.optim, config.engine
    if (optim.steps is None) == (optim.epochs is None):
        raise UserError("optim.steps, optim.epochs: give exactly one of the two")
    if optim.nesterov and optim.momentum == 0:
        raise UserError("optim.nesterov: needs optim.momentum above 0, got 0")
    if engine.dtype == "float16" and engine.zero_stage == 0:
        raise UserError(
            "engine.zero_stage: float16 needs 1 or 2 (DeepSpeed 0.19 never scales the loss at 0), got 0"
        )
    if config.data.batch_size % engine.accumulation_steps:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} is not divisible by "
            f"engine.accumulation_steps={engine.accumulation_steps}"
        )


def _check_weights_and_pixels(config: Config) -> None:
    backbone = config.backbone
    if config.init.head and (config.init.from_ is None or config.init.centroids == "class_means"):
        raise UserError("init.head: needs init.from, and init.centroids=random")
    if config.init.centroids == "class_means" and not config.loss.weights.keys() - _WITHOUT_ANGLES:
        raise UserError(
            f"init.centroids: class_means needs a loss with rows of directions, got {config.loss.name}"
        )
    for name, values in (("mean", backbone.mean), ("std", backbone.std)):
        if values is not None and len(values) not in (1, backbone.channels):
            raise UserError(f"backbone.{name}: has {len(values)} numbers for {backbone.channels} channels")
    for name, values in (("crop_scale", config.augment.crop_scale), ("zoom", config.augment.zoom)):
        if values is not None and values[0] > values[1]:
            raise UserError(f"augment.{name}: the first number is the smaller, got {list(values)}")


def _check_data(config: Config) -> None:
    data = config.data
    if data.reader == "stream":
        _check_stream(config)
    if data.mix and data.sampler != "shuffled":
        raise UserError(f"data.mix: needs data.sampler=shuffled, got {data.sampler}")
    if data.shuffle_window and (data.mix or data.sampler != "shuffled"):
        raise UserError("data.shuffle_window: needs data.sampler=shuffled and no data.mix")


def _check_stream(config: Config) -> None:
    """Refuse what the stream reader cannot do."""
    data = config.data
    if data.epoch_images is None or config.head.num_classes is None:
        raise UserError("data.reader: stream needs data.epoch_images and head.num_classes")
    if isinstance(data.train, Url) and data.train.scheme == "pipe":
        raise UserError(f"data.train: data.reader=stream reads folders and addresses, got {data.train}")
    wanted = {
        "sampler": data.sampler != "shuffled",
        "shuffle_window": data.shuffle_window is not None,
        "mix": bool(data.mix),
        "on_bad_sample": data.on_bad_sample != "stop",
        "quarantine": data.quarantine is not None,
        "log_batch_digest": data.log_batch_digest,
    }
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        raise UserError(f"data.{name}: needs data.reader=indexed, got stream")


def _check_test_sets(config: Config) -> None:
    sets, best = config.eval, config.checkpoint.keep_best
    addresses = {
        "data.train": config.data.train,
        **{f"data.mix.{place}": place for place in config.data.mix},
        **{f"eval.classification.{name}": place for name, place in sets.classification.items()},
        **{f"eval.verification.{name}": place for name, place in sets.verification.items()},
    }
    for name, place in addresses.items():
        if isinstance(place, Url) and place.scheme == "pipe" and not config.data.allow_pipe:
            raise UserError(f"{name}: {place} is a command; it needs data.allow_pipe=true")
    if best and best.split("/")[1] not in sets.classification.keys() | sets.verification.keys():
        raise UserError(f"checkpoint.keep_best: {best} is of a test set that `eval` does not have")
    for name in (*sets.classification, *sets.verification, *sets.protocols):
        if not name or "/" in name:
            raise UserError(f"eval: the name of a test set is part of file names, got {name!r}")
    for name in sets.classification.keys() & sets.verification.keys():
        raise UserError(f"eval.verification.{name}: eval.classification has a set of the same name")
    for name in sets.protocols.keys() & {*sets.classification, *sets.verification}:
        raise UserError(f"eval.protocols.{name}: another test set has the same name")


def _check_losses(config: Config) -> None:
    loss = config.loss
    for term, weight in loss.extra.items():
        if term == loss.name or (term == "softmax" and loss.name == "center"):
            raise UserError(f"loss.extra.{term}: is a part of loss.name={loss.name} already")
        if weight == 0 and term != "center":
            raise UserError(f"loss.extra.{term}: 0 has no effect; only center may have it, got 0")
    if loss.label_smoothing and loss.name in UNFUSED | {"curricularface", "normface", "uniface"}:
        raise UserError(f"loss.label_smoothing: {loss.label_smoothing} is not defined with {loss.name}")
    if loss.margins and loss.name in UNFUSED:
        raise UserError(f"loss.margins: {loss.name} has none, got {loss.margins}")


def _check_head(config: Config) -> None:
    loss, head, engine = config.loss, config.head, config.engine
    if head.state_dtype == "bfloat16" and (head.update != "fused" or loss.name in UNFUSED):
        raise UserError("head.state_dtype: bfloat16 needs head.update=fused and a loss of cosines")
    if head.sub_centroids > 1 and (loss.name in UNFUSED or loss.extra or loss.label_smoothing):
        raise UserError(
            f"head.sub_centroids: {head.sub_centroids} needs a loss of cosines alone, without label smoothing"
        )
    if head.side_stream:
        _require(
            f"head.side_stream: {head.side_stream}",
            {
                "head.update": (head.update, "fused"),
                "optim.clip_norm": (config.optim.clip_norm, None),
                "engine.accumulation_steps": (engine.accumulation_steps, 1),
                "engine.on_nonfinite": (engine.on_nonfinite, "stop"),  # rows are changed before it is known
                "loss.extra": (loss.extra, {}),
            },
        )
        if loss.name in UNFUSED:
            raise UserError(f"head.side_stream: true needs a loss of cosines, got {loss.name}")
        if engine.dtype == "float16":
            raise UserError(
                "head.side_stream: true needs another engine.dtype than float16, whose loss is scaled"
            )
    if head.sample_rate < 1.0:
        _require(
            f"head.sample_rate: {head.sample_rate}",
            {
                "head.update": (head.update, "fused"),
                "head.sub_centroids": (head.sub_centroids, 1),
                "loss.label_smoothing": (loss.label_smoothing, 0.0),
                "engine.accumulation_steps": (engine.accumulation_steps, 1),
            },
        )
        if loss.name in UNFUSED:
            raise UserError(f"head.sample_rate: {head.sample_rate} needs a loss of cosines")


def _require(what: str, others: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise UserError for the first of other fields, name -> (value, needed), that does not fit."""
    for field, (value, needed) in others.items():
        if value != needed:
            raise UserError(f"{what} needs {field}={'null' if needed is None else needed}, got {value}")
