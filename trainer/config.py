"""Every option of a run: typed, checked and documented once, here.

Each field is explained by the string under it, and nowhere else: ``--help`` and ``docs/config.md`` are
generated from these strings by ``trainer/options.py``, which also reads YAML and the command line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo

from trainer.errors import UserError

T = TypeVar("T")
PositiveInt = Annotated[int, Field(ge=1, strict=True)]  # strict: true is not 1
NotNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Range = tuple[Positive, Positive]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that refuses unknown keys and wrong types."""
    strict = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return cast(type[T], checked_dataclass(frozen=True, kw_only=True, slots=True, config=strict)(cls))


@section
class RunConfig:
    """Where a run lives."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below `run.root`, and its name in W&B. None takes the stem of the YAML file, or
    `default` without one."""

    root: Path = Path("runs")
    """Folder that holds the runs."""


@section
class DataConfig:
    """What is read, and in which batches."""

    train: Path
    """Folder of data shards with an index, as `launch/pack.py` writes it."""

    batch_size: PositiveInt = 256
    """Images of one optimizer step, over all ranks and accumulated micro-batches (the *global* batch)."""

    workers: NotNegativeInt = 2
    """Processes per rank that read and decode; 0 reads in the training process. Changes speed only."""

    log_batch_digest: bool = False
    """Write `data/batch_digest` at every step: an order-sensitive hash of the positions, pixels and labels
    of the global batch, equal on any number of ranks and workers."""


@section
class AugmentConfig:
    """How training images are varied. The draw of a sample depends on (seed, epoch, position) only."""

    crop_scale: Range | None = None
    """Area of a random resized crop relative to the image, such as [0.5, 1.0]. None does not crop."""

    flip: Fraction = 0.0
    """Probability of a horizontal flip."""

    rotate_degrees: NotNegative = 0.0
    """Rotation, uniform in plus or minus this many degrees."""

    shift: Fraction = 0.0
    """Translation, uniform in plus or minus this fraction of the side."""

    zoom: Range | None = None
    """Isotropic scale factor, such as [0.9, 1.1]."""

    color_jitter: NotNegative = 0.0
    """Strength of random brightness, contrast and saturation."""

    erase: Fraction = 0.0
    """Probability of erasing a random rectangle."""


@section
class BackboneConfig:
    """The network that turns images into embeddings, copied on every rank."""

    name: str = "resnet18"
    """Any timm model by name, or one of `trainer/networks.py` (such as `lenetpp`)."""

    image_size: PositiveInt | None = None
    """Side of the square input in pixels. None takes the model's own size."""

    channels: Literal[1, 3] = 3
    """Channels of the input: 3 reads images as RGB, 1 as grey."""

    mean: tuple[float, ...] | None = None
    """Subtracted from pixels scaled to 0..1, one number or one per channel. None takes the model's own."""

    std: tuple[Positive, ...] | None = None
    """Pixels are divided by it after the mean is subtracted. None takes the model's own."""

    pretrained: bool = False
    """Start from timm's published weights (needs network, or a warm Hugging Face cache)."""

    drop_path: Fraction = 0.0
    """Stochastic depth rate of the timm model."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward to save memory."""

    neck: Literal["none", "linear", "bn_linear", "bn_linear_bn"] = "bn_linear"
    """Between the pooled output and the embedding: nothing; dropout and a linear layer; the same behind a
    batch norm; or between two."""

    embedding_dim: PositiveInt | None = 512
    """Width D of the embedding. None takes the width of the pooled output."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate inside the neck."""

    batch_norm: Literal["global", "local"] = "global"
    """Statistics of every batch norm: over the micro-batches of all ranks together (the loss curve then does
    not depend on the number of ranks), or over each rank's own images (faster, and it does)."""


@section
class LossConfig:
    """What is minimised."""

    name: Literal[
        "coco", "softmax", "cosface", "arcface", "combined", "sphereface", "curricularface", "adaface",
        "magface", "elasticface_arc", "elasticface_cos", "adacos", "normface", "uniface",
    ] = "coco"  # fmt: skip
    """`coco`: scaled cosine softmax over learned unit centroids. `softmax`: inner products and a bias,
    the baseline. The others are COCO with a margin or another rule for the scale: docs/coco.md."""

    margins: dict[str, float] = Field(default_factory=dict)
    """Numbers of a margin loss that differ from its paper's, by name: `{margin: 0.4}` for cosface."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread evenly over all classes."""


@section
class HeadConfig:
    """The class-parallel head: rank r holds the rows of its share of the classes."""

    num_classes: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Classes over all ranks; need not be divisible by their number. None takes it from the data's index."""

    scale: Positive | Literal["paper", "simplex", "adacos"] = "simplex"
    """Factor alpha on the cosines: a number, or a rule of docs/coco.md applied to the number of classes."""

    sub_centroids: PositiveInt = 1
    """Centroids per class, of which the nearest counts: noise gathers around others than the main one."""

    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the classes that take part in a step, beside those of the batch; new ones in every step. Below
    1 (fused only) the loss is no longer the exact softmax: docs/coco.md says by how much."""

    dead_after_steps: PositiveInt | None = None
    """`train/dead_classes` counts the classes that had no sample in so many steps. None takes two epochs."""

    update: Literal["fused", "autograd"] = "fused"
    """`fused`: two passes over tiles of classes, no logits and no gradient in memory. `autograd`: an
    ordinary gradient for the centroids, for research; the softmax baseline has only this one."""

    optimizer: Literal["same", "sgd", "adamw", "row_adagrad"] = "same"
    """Optimizer of the rows: as the backbone's, or another. `row_adagrad` keeps one number per class."""

    side_stream: bool = False
    """Second pass of the fused head beside the backward pass of the backbone, in a stream of its own. Needs
    `optim.clip_norm=null` and one micro-batch. Not run on a GPU yet, where alone it could save time."""

    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Rows and their optimizer state in memory. `bfloat16` (fused only) halves them, rounded at random."""

    product_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix products of the fused head. `auto`: bfloat16 with `state_dtype: bfloat16` or a backbone that
    computes in it, else float32. Sums and the loss are float32 and float64 always."""

    cache_mib: Annotated[int, Field(ge=0, strict=True)] = 52
    """Memory per rank in which the fused head keeps exponentials, to save computing them again."""

    lr_multiplier: Positive = 1.0
    """Learning rate of the head relative to `optim.lr`."""

    weight_decay: NotNegative = 0.0
    """Weight decay of the head. COCO does not see the length of its rows; decay only keeps it in bounds."""


@section
class OptimConfig:
    """The optimizer, the same kind for backbone and head, and its schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum, or `adamw`."""

    lr: Positive = 0.1
    """Peak learning rate."""

    momentum: Decay = 0.9
    """Momentum of SGD."""

    nesterov: bool = False
    """Nesterov momentum (SGD)."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""

    weight_decay: NotNegative = 5e-4
    """Weight decay of the backbone's matrices and filters; biases and norms have none."""

    steps: PositiveInt | None = None
    """Length of training in optimizer steps. Exactly one of `steps` and `epochs` is given."""

    epochs: Positive | None = None
    """Length of training in passes over the data."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""

    warmup_steps: NotNegativeInt = 0
    """Steps of linear warm-up."""

    final_lr: Fraction = 0.0
    """Learning rate of the last step relative to the peak."""

    clip_norm: Positive | None = 5.0
    """Longest gradient: the norm over backbone and head of all ranks together. None does not clip."""


@section
class EngineConfig:
    """How the backbone runs: precision, sharding of its optimizer, accumulation."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type of the backbone; head and loss stay float32. `auto` is bfloat16 on a GPU that has it,
    else float32. `float16` needs `zero_stage` 1 or 2; DeepSpeed keeps its dynamic loss scale."""

    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage of the backbone: 0 copies, 1 cuts optimizer state, 2 gradients too."""

    accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; the global batch is divided among them."""

    timeout_seconds: Positive = 600.0
    """A collective that waits longer ends every rank with an error that names the ranks it waited for."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not a number, on any rank: `stop` ends the run, `skip` leaves the step out
    on all ranks. Either keeps the batch below `nonfinite/` and names its samples. An overflow of float16's
    scaled gradients is neither: it is skipped and lowers the loss scale, by design."""

    max_skipped_steps: PositiveInt = 10
    """With `on_nonfinite: skip`: more such steps in a row stop the run."""

    check_weights_every: PositiveInt | None = 1000
    """Every so many steps, and before a checkpoint, compare a hash of the backbone's weights over the ranks:
    copies that differ stop the run. None does not."""

    wall_clock_breakdown: bool = False
    """DeepSpeed's own timers of forward, backward and step."""

    deepspeed_overrides: dict[str, Any] = Field(default_factory=dict)
    """Merged last into DeepSpeed's dictionary, and shown in the run sheet. Unknown keys are refused."""


@section
class CheckpointConfig:
    """What is kept, and from where a run goes on."""

    every_steps: PositiveInt | None = None
    """Save every so many steps. None saves only at the end."""

    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""

    keep_every: PositiveInt | None = None
    """Also keep, for good, the checkpoints of steps that are multiples of this."""

    keep_best: str | None = Field(default=None, pattern=r"^eval/[^/]+/.+$")
    """Also keep the checkpoint with the best value of this metric, such as `eval/same/accuracy`, among those
    saved in a step that was evaluated."""

    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of `keep_best` is the best."""

    asynchronous: bool = False
    """Copy the state in memory and write it behind training. Needs, per rank, as much memory as its part of
    the checkpoint; at most one save is in flight."""

    resume: str = "auto"
    """`auto`: the newest complete checkpoint of the run's folder, if any; a damaged one is set aside for the
    one before. `never`: start anew; refused when the folder already holds checkpoints. Else the path of a
    checkpoint: the run goes on from there, and the same command again from what it has saved since."""

    allow_changes: list[str] = Field(default_factory=list)
    """Fields that may differ from those of the checkpoint although that makes another training, such as
    `[optim.weight_decay]`. Lengths, learning rate, ranks, batch, logging and the like always may."""


@section
class EvalConfig:
    """Test sets by name, and when they are looked at. Metrics are named `eval/<set>/<metric>`. A YAML file's
    sets go with its data: naming another `data.train` on the command line drops them."""

    classification: dict[str, Path] = Field(default_factory=dict)
    """Sets whose classes are those of training: accuracy by nearest centroid."""

    verification: dict[str, Path] = Field(default_factory=dict)
    """Sets of unseen classes: all-pairs verification and leave-one-out identification."""

    every_steps: PositiveInt | None = None
    """Evaluate every so many steps. None evaluates only at the end."""

    batch_size: PositiveInt = 256
    """Images of one evaluation batch, over all ranks."""


@section
class LogConfig:
    """What is written, how often and where to."""

    every_steps: PositiveInt = 10
    """Steps between two lines of metrics.jsonl, the console and W&B."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """W&B mode. `offline` needs no account; `wandb sync` uploads it later. W&B never stops a run."""

    wandb_project: str = "coco-trainer"
    """Project of the run in W&B."""

    progress: bool = True
    """Progress bar on stderr (rank 0)."""


@section
class Config:
    """One run."""

    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Initial weights, data order and augmentation are functions of it, never of the number of ranks."""

    data: DataConfig
    run: RunConfig = Field(default_factory=RunConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    head: HeadConfig = Field(default_factory=HeadConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @property
    def run_folder(self) -> Path:
        """Folder of the run."""
        return self.run.root / (self.run.name or "default")


_ADAPTER = TypeAdapter(Config)


class InvalidConfigError(Exception):
    """A tree that does not fit; ``errors`` are pydantic's records (loc, type, msg, input), innermost last."""

    def __init__(self, errors: list[Any]) -> None:
        super().__init__(f"{len(errors)} invalid fields")
        self.errors = errors


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the sections above. Raises InvalidConfigError."""
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise InvalidConfigError(error.errors()) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested values that YAML and JSON can hold."""
    return _ADAPTER.dump_python(config, mode="json")


def field_infos(cls: type) -> dict[str, FieldInfo]:
    """Return name -> type, default and docstring of every field of a section."""
    return cast(dict[str, FieldInfo], cls.__pydantic_fields__)  # type: ignore[attr-defined]


def check_across_fields(config: Config) -> None:
    """Refuse combinations that no single field can see. Raises UserError."""
    optim, engine, backbone = config.optim, config.engine, config.backbone
    if (optim.steps is None) == (optim.epochs is None):
        raise UserError("optim.steps, optim.epochs: give exactly one of the two")
    if optim.nesterov and optim.momentum == 0:
        raise UserError("optim.nesterov: needs optim.momentum above 0, got 0")
    if engine.dtype == "float16" and engine.zero_stage == 0:
        raise UserError(
            "engine.zero_stage: float16 needs 1 or 2 (DeepSpeed 0.19 never scales the loss at 0), got 0"
        )
    head = config.head
    if head.state_dtype == "bfloat16" and (head.update != "fused" or config.loss.name == "softmax"):
        raise UserError("head.state_dtype: bfloat16 needs head.update=fused and a loss of cosines")
    _check_variants(config)
    for name, values in (("mean", backbone.mean), ("std", backbone.std)):
        if values is not None and len(values) not in (1, backbone.channels):
            raise UserError(f"backbone.{name}: has {len(values)} numbers for {backbone.channels} channels")
    for name, values in (("crop_scale", config.augment.crop_scale), ("zoom", config.augment.zoom)):
        if values is not None and values[0] > values[1]:
            raise UserError(f"augment.{name}: the first number is the smaller, got {list(values)}")
    best = config.checkpoint.keep_best
    if best and best.split("/")[1] not in config.eval.classification.keys() | config.eval.verification.keys():
        raise UserError(f"checkpoint.keep_best: {best} is of a test set that `eval` does not have")
    for name in config.eval.classification.keys() & config.eval.verification.keys():
        raise UserError(f"eval.verification.{name}: eval.classification has a set of the same name")
    if config.data.batch_size % engine.accumulation_steps:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} is not divisible by "
            f"engine.accumulation_steps={engine.accumulation_steps}"
        )


def _check_variants(config: Config) -> None:
    """Refuse what the head cannot do together. Raises UserError."""
    loss, head = config.loss, config.head
    if loss.label_smoothing and loss.name in ("softmax", "curricularface", "normface", "uniface"):
        raise UserError(f"loss.label_smoothing: {loss.label_smoothing} is not defined with {loss.name}")
    if head.sub_centroids > 1 and (loss.name == "softmax" or loss.label_smoothing):
        raise UserError(
            f"head.sub_centroids: {head.sub_centroids} needs a loss of cosines without label smoothing"
        )
    if head.side_stream:
        others: dict[str, tuple[Any, Any]] = {
            "head.update": (head.update, "fused"),
            "optim.clip_norm": (config.optim.clip_norm, None),
            "engine.accumulation_steps": (config.engine.accumulation_steps, 1),
            "engine.on_nonfinite": (
                config.engine.on_nonfinite,
                "stop",
            ),  # rows are changed before it is known
        }
        _require(f"head.side_stream: {head.side_stream}", others)
        if config.engine.dtype == "float16":
            raise UserError(
                "head.side_stream: true needs another engine.dtype than float16, whose loss is scaled"
            )
    if head.sample_rate < 1.0:
        others = {
            "head.update": (head.update, "fused"),
            "head.sub_centroids": (head.sub_centroids, 1),
            "loss.label_smoothing": (loss.label_smoothing, 0.0),
            "engine.accumulation_steps": (config.engine.accumulation_steps, 1),
        }
        _require(f"head.sample_rate: {head.sample_rate}", others)
        if loss.name == "softmax":
            raise UserError(f"head.sample_rate: {head.sample_rate} needs a loss of cosines")


def _require(what: str, others: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise UserError for the first of other fields, name -> (value, needed), that does not fit."""
    for field, (value, needed) in others.items():
        if value != needed:
            raise UserError(f"{what} needs {field}={'null' if needed is None else needed}, got {value}")
