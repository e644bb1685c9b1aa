"""TrainState, all that changes while training: made from a configuration, saved, restored."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.backbone import build_backbone
from trainer.checkpoint import Contents, head_tensors
from trainer.collectives import sum_over
from trainer.config import UNFUSED, Config, to_dict
from trainer.distributed import World, require_memory
from trainer.engine import build_engine, compute_dtype, state_numbers, state_tensors
from trainer.errors import UserError
from trainer.feed import TrainingData
from trainer.fused import HIGHEST_LOGIT, FusedCocoHead
from trainer.head import ClassShard, CocoHead, DenseHead
from trainer.health import require_equal_weights
from trainer.losses.terms import build_term, num_matrices
from trainer.losses.weighted_sum import WeightedSum
from trainer.margins import MARGINS, build_margin
from trainer.optimizer import allocate_state, build_optimizer, parameter_groups
from trainer.order import Position
from trainer.saving import Checkpoints
from trainer.scale import scale_of


@dataclass
class TrainState:
    """Everything that changes while training, and nothing else: what a checkpoint holds."""

    engine: Any
    head: DenseHead
    head_optimizer: Optimizer
    step: int = 0
    position: Position = field(default_factory=Position)
    started_from: str | None = None
    """The checkpoint that the user named and this run, or the one it goes on from, began with."""


def build_state(config: Config, world: World) -> TrainState:
    """Build backbone, head and optimizers from the seed; every rank must call it."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, world.group)
    head = build_head(config, world, backbone.dim)
    name = None if config.head.optimizer == "same" else config.head.optimizer
    head_optimizer = build_optimizer(config.optim, parameter_groups(head, config.head.weight_decay), name)
    allocate_state(head_optimizer)
    return TrainState(build_engine(config, backbone, world), head, head_optimizer)


def build_head(config: Config, world: World, dim: int) -> DenseHead:
    """Build this rank's part of the head on its device; communicates nothing. Raises UserError."""
    assert config.head.num_classes is not None
    num_classes = config.head.num_classes
    if num_classes < world.size:
        raise UserError(f"head.num_classes: {num_classes} classes cannot be cut over {world.size} ranks")
    shard = ClassShard.of_rank(num_classes, world.rank, world.size)
    what = f"head.num_classes: {num_classes} x {dim}"
    require_memory(head_bytes(config, len(shard), dim), world, what)
    weights = config.loss.weights
    parts = {
        name: build_term(name, config, shard, dim, world.group)
        if name in UNFUSED
        else _build_cosine_head(name, config, world, shard, dim)
        for name in weights
    }
    if len(parts) == 1 and config.loss.name in (*MARGINS, "softmax"):
        return parts[config.loss.name].to(world.device)
    return WeightedSum({name: (weights[name], part) for name, part in parts.items()}).to(world.device)


def _build_cosine_head(name: str, config: Config, world: World, shard: ClassShard, dim: int) -> CocoHead:
    """Build COCO or one of its relatives: fused, or with an ordinary gradient. Raises UserError."""
    scale = scale_of(config.head.scale, shard.num_classes)
    numbers = config.loss.margins if name == config.loss.name else {}
    settings: dict[str, Any] = {
        "loss": build_margin(name, scale, config.seed, num_classes=shard.num_classes, **numbers),
        "seed": config.seed,
        "group": world.group,
        "sub_centroids": config.head.sub_centroids,
        "label_smoothing": config.loss.label_smoothing,
    }
    if config.head.update == "autograd":
        return CocoHead(shard, dim, **settings)
    loss = settings["loss"]
    if loss.highest_logit() > HIGHEST_LOGIT:
        raise UserError(
            f"head.scale: logits up to {loss.highest_logit():.4g} do not fit the exponentials of the fused "
            f"head ({HIGHEST_LOGIT:g}); lower it or take head.update=autograd"
        )
    row_type, product_type = head_types(config, world)
    return FusedCocoHead(
        shard,
        dim,
        **settings,
        sample_rate=config.head.sample_rate,
        row_type=row_type,
        product_type=product_type,
        cache_bytes=None if config.head.cache_mib is None else config.head.cache_mib << 20,
    )


def head_types(config: Config, world: World) -> tuple[torch.dtype, torch.dtype]:
    """Return the types of the fused head's rows and of its matrix products."""
    product = config.head.product_dtype
    if product == "auto":
        in_bfloat16 = "bfloat16" in (config.head.state_dtype, compute_dtype(config, world))
        product = "bfloat16" if in_bfloat16 else "float32"
    return getattr(torch, config.head.state_dtype), getattr(torch, product)


def head_bytes(config: Config, num_rows: int, dim: int) -> int:
    """Return the bytes of a rank's rows and their optimizer state (and dense gradients, where there are).

    ``num_rows`` counts classes; each has ``head.sub_centroids`` rows.
    """
    name = config.optim.name if config.head.optimizer == "same" else config.head.optimizer
    matrices = {"sgd": 1 + bool(config.optim.momentum), "adamw": 3, "row_adagrad": 1}[name]
    of_cosines = matrices + (config.head.update == "autograd")
    row_bytes = 4
    for term in config.loss.weights:
        if term in UNFUSED:
            row_bytes += num_matrices(term, config, matrices) * dim * 4
        else:
            row_bytes += of_cosines * dim * getattr(torch, config.head.state_dtype).itemsize
    return num_rows * (config.head.sub_centroids * row_bytes + 4)


def save(
    state: TrainState,
    config: Config,
    checkpoints: Checkpoints,
    data: TrainingData,
    metrics: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint, or begin to if ``checkpoint.asynchronous``; every rank must call it.

    ``data`` is what is trained on, ``metrics`` are of an evaluation in this step.
    """
    if config.engine.check_weights_every:
        require_equal_weights(state.engine.module, state.head.group, state.step)
    write = checkpoints.start if config.checkpoint.asynchronous else checkpoints.save
    write(contents_of(state, config, data, metrics or {}))


def contents_of(state: TrainState, config: Config, data: TrainingData, metrics: dict[str, float]) -> Contents:
    """Return what a checkpoint holds: the tensors themselves, which go on changing. Collective."""
    share_statistics(state)
    record = {
        "position": dataclasses.asdict(state.position),
        "numbers": state_numbers(state.engine),
        "loss": loss_statistics(state.head),
        "data_fingerprint": data.fingerprint,
        "ranks": state.head.group.size(),
        "started_from": state.started_from,
        "metrics": metrics,
        "config": to_dict(config),
    }
    is_main = state.head.group.rank() == 0  # the others compute the backbone's state with it and drop it
    backbone = {name: tensor for name, tensor in state_tensors(state.engine) if is_main}
    head = head_tensors(state.head, state.head_optimizer)
    return Contents(state.step, record, backbone, head, state.head.row_shard, data.class_names)


@torch.no_grad()
def share_statistics(state: TrainState) -> None:
    """Make the running statistics of local batch norms the mean over ranks; every rank must call it.

    Global ones are equal already. Without it the ranks would judge, and one of them save, different models.
    """
    for buffer in state.engine.module.buffers():
        if buffer.is_floating_point():
            mean = sum_over(buffer.double(), state.head.group) / state.head.group.size()
            buffer.copy_(mean)  # in float64 the mean of equal numbers is that number


def loss_statistics(head: DenseHead) -> dict[str, float]:
    """Return the running statistics of the loss, the same on every rank; COCO has none."""
    return {name: float(value) for name, value in head.statistics().items()}


def load_loss_statistics(head: DenseHead, record: dict[str, Any]) -> None:
    """Restore what ``loss_statistics`` returned from a checkpoint's record."""
    for name, value in head.statistics().items():
        value.fill_(record["loss"][name])
