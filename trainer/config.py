"""Every option of a run: typed, checked and documented once, here.

Each field is explained by the string under it, and nowhere else: ``--help`` and ``docs/config.md`` are
generated from these strings by ``trainer/options.py``, which also reads YAML and the command line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo

from trainer.address import Url, location

T = TypeVar("T")
PositiveInt = Annotated[int, Field(ge=1, strict=True)]  # strict: true is not 1
NotNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Range = tuple[Positive, Positive]
Region = Literal["head", "face", "upper", "body"]
_HEAD_ONLY: dict[Region, Path | None] = {"head": None}
Location = Annotated[Path | Url, BeforeValidator(location), PlainSerializer(str)]  # saved without credentials


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that refuses unknown keys and wrong types."""
    strict = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return cast(type[T], checked_dataclass(frozen=True, kw_only=True, slots=True, config=strict)(cls))


ROWLESS = frozenset({"triplet", "contrastive", "coco_minibatch"})
"""Losses that hold no row per class."""

UNFUSED = ROWLESS | {"softmax", "center", "standalone_center"}
"""Losses that the fused head does not have: those not of cosines to centroids."""


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

    train: Location
    """Folder of data shards with an index, as `launch/pack.py` writes it; or its `https://`, `http://`,
    `s3://` or `gs://` address, whose shards are kept in `data.cache_dir` (docs/data.md)."""

    cache_dir: Path | None = None
    """Where remote shards are kept, shared by all ranks and runs of a node: a disk of its own, not a network
    folder. None takes `~/.cache/coco-trainer` (or below `XDG_CACHE_HOME`)."""

    cache_gib: Positive = 100.0
    """Most that `data.cache_dir` may hold. Beyond it the shard that is needed latest makes room."""

    allow_pipe: bool = False
    """Allow `pipe:PROGRAM ARGUMENT {} ...` for an address: a program (never a shell) that writes the named
    file to its output. Off, because an address then is a command."""

    batch_size: PositiveInt = 256
    """Images of one optimizer step, over all ranks and accumulated micro-batches (the *global* batch)."""

    workers: NotNegativeInt = 2
    """Processes per rank that read and decode; 0 reads in the training process. Changes speed only."""

    reader: Literal["indexed", "stream"] = "indexed"
    """`indexed` reads any sample by the index: exact epochs, the same batches on any number of ranks, resumed
    where they were. `stream` reads shards without an index from front to back and promises none of these:
    `trainer/stream.py`. It needs `head.num_classes` and `epoch_images`. Remote shards are then not kept, and
    named by their folder, if it has an index, or one by one: `https://host/set-{000..146}.tar`."""

    epoch_images: PositiveInt | None = None
    """Images that count as an epoch of the stream reader."""

    stream_buffer: PositiveInt = 5000
    """Samples among which each worker of the stream reader shuffles."""

    sampler: Literal["shuffled", "balanced", "class_weighted"] = "shuffled"
    """Order of an epoch. `shuffled`: every image once. `balanced` (P x K): a micro-batch holds
    `samples_per_class` images of each of its classes, all on one rank. `class_weighted`: a class with n
    images is drawn in proportion to n to the power of `class_power`. None depends on the number of ranks."""

    samples_per_class: PositiveInt = 4
    """K of the balanced sampler; must divide the images of a rank's micro-batch. A class with fewer images
    repeats them."""

    class_power: Fraction = 0.5
    """Of the class-weighted sampler: 1 is the data's own frequencies, 0.5 their square root, 0 shows every
    class equally often."""

    shuffle_window: PositiveInt | None = None
    """Shuffle so many data shards at a time, in random order, so that images which are neighbours on a slow
    disk are read at about the same time. None shuffles all of the data together, however large."""

    mix: dict[Location, Positive] = Field(default_factory=dict)
    """Further folders of data shards, or addresses, and how many of their images are drawn for one of
    `train`. An epoch is one pass over `train`; all images of a set are drawn before any is drawn again.
    Shuffled only."""

    mix_labels: Literal["name", "offset"] = "name"
    """Classes of mixed data sets: those of the same name are one class, or each set has its own, numbered
    behind those of the set before."""

    on_bad_sample: Literal["stop", "replace"] = "stop"
    """What happens to an image that cannot be decoded: the run stops, or another image takes its place, the
    same on any number of ranks, and it is noted in the run's folder, in `bad_samples`. Storage that cannot be
    read is tried again and then always stops the run."""

    max_bad_fraction: Fraction = 0.001
    """With `on_bad_sample: replace`: more bad images than this part of the data stop the run."""

    quarantine: Path | None = None
    """File of a run's `bad_samples`, or the folder: these images are replaced without being tried, by those
    that `on_bad_sample: replace` takes."""

    reduced_decode: bool = False
    """Decode large JPEGs at 1/2, 3/8, 1/4 or 1/8 of their size where no crop needs more pixels: faster, and
    slightly other pixels, the same on every rank. Training only."""

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

    rand_augment: Annotated[int, Field(ge=0, le=30, strict=True)] = 0
    """Magnitude, 1 to 30, of RandAugment: two operations of its list on every image. 0 has none."""

    low_resolution: Fraction = 0.0
    """Probability of shrinking the image to 0.2 to 1 of its side and enlarging it again, as faces of
    surveillance cameras are."""

    occlusion: Fraction = 0.0
    """Probability of covering with grey a quarter to a half of the image, from one of its four sides, as
    masks, scarves and hats do."""


@section
class BackboneConfig:
    """The network that turns images into embeddings, copied on every rank."""

    name: str = "resnet18"
    """Any timm model by name, or one of `trainer/networks.py` (`lenetpp`, `lenetspp`, `preact_resnet`,
    `cifarnet`, `cifarnet_wide`)."""

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

    channels_last: bool = False
    """Keep activations with their channels last in memory, the layout of tensor cores; on CPU, too, small
    networks of convolutions gain, others lose: docs/decisions.md."""

    neck: Literal["none", "linear", "linear_prelu", "bn_linear", "bn_linear_bn"] = "bn_linear"
    """Between the pooled output and the embedding: nothing; dropout and a linear layer; the same before a
    PReLU (the papers' softmax on MNIST), behind a batch norm, or between two."""

    embedding_dim: PositiveInt | None = 512
    """Width D of the embedding. None takes the width of the pooled output."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate inside the neck."""

    batch_norm: Literal["global", "local"] = "global"
    """Statistics of every batch norm: over the micro-batches of all ranks together (the loss curve then does
    not depend on the number of ranks), or over each rank's own images (faster, and it does)."""


@section
class SoftmaxConfig:
    """Plain softmax over inner products, the baseline."""

    bias: bool = True
    """Add a learned number to the inner product of each class. Without it, as in the demonstrations of COCO
    and center loss, the class of an embedding depends on its direction only."""


@section
class CenterConfig:
    """Center loss (Wen et al., 2016): distance to class centres that follow the images."""

    weight: NotNegative = 0.003
    """Factor lambda of the center loss in `loss.name: center`, which is softmax + lambda center."""

    update: Literal["alpha", "sgd"] = "alpha"
    """How centres move: `alpha`, the paper's eq. 4; `sgd`, plain descent of the mean squared distance."""

    rate: Positive = 0.5
    """The paper's alpha (up to 1), or the learning rate of `sgd`."""

    features: Literal["raw", "unit"] = "raw"
    """Distances of embeddings as they are, or divided by their lengths."""


@section
class TripletConfig:
    """Triplet loss on squared Euclidean distances, over the triplets of the global batch (a micro-batch, if
    `engine.accumulation_steps` makes several)."""

    margin: Positive = 0.2
    """By how much a squared distance within a class should be smaller than one to another class."""

    mining: Literal["all", "random_violating", "semi_hard", "batch_hard"] = "random_violating"
    """Which triplets count: every one; per pair of a class one random negative of those that violate the
    margin; the nearest one beyond the pair; per image the farthest of its class and the nearest other."""

    features: Literal["unit", "raw"] = "unit"
    """Distances of embeddings divided by their lengths, or as they are."""


@section
class ContrastiveConfig:
    """Contrastive loss over all pairs of the global batch (a micro-batch, if `engine.accumulation_steps`
    makes several)."""

    margin: Positive = 1.0
    """Distance that images of different classes should keep."""

    features: Literal["unit", "raw"] = "unit"
    """Distances of embeddings divided by their lengths, or as they are."""


@section
class StandaloneCenterConfig:
    """Standalone center loss: trained centres attract their images, and a second term parts the classes."""

    inter: Literal["images", "centres", "classifier"] = "images"
    """What parts them: distances of images of different classes; distances of centres; a linear layer and
    a softmax over the centres."""

    intra_weight: NotNegative = 1.0
    """Weight of the attraction."""

    inter_weight: NotNegative = 0.1
    """Weight of what parts classes."""

    log_offset: NotNegative = 0.0
    """`images`: added to squared distances under the logarithm. The published rows have 1, their text 0."""

    exponent: Positive = 0.01
    """`centres`: the attraction is exp(exponent x squared distance)."""


@section
class LossConfig:
    """What is minimised."""

    name: Literal[
        "coco", "softmax", "center", "triplet", "contrastive", "coco_minibatch", "standalone_center",
        "cosface", "arcface", "combined", "sphereface", "curricularface", "adaface", "magface",
        "elasticface_arc", "elasticface_cos", "adacos", "normface", "uniface",
    ] = "coco"  # fmt: skip
    """`coco`: scaled cosine softmax over learned unit centroids. `softmax`: inner products (and a bias),
    the baseline. `center` (softmax + center loss), `triplet`, `contrastive`, `coco_minibatch` (version 1 of
    COCO) and `standalone_center`: trainer/losses. The others are COCO with a margin or another rule for the
    scale: docs/coco.md."""

    extra: dict[
        Literal["coco", "softmax", "center", "triplet", "contrastive", "coco_minibatch", "standalone_center"],
        NotNegative,
    ] = Field(default_factory=dict)
    """Losses added to `loss.name`, each with its weight: `{triplet: 0.1, center: 0.003}`. The first that has
    rows judges, center if no other has. `center: 0` changes nothing but keeps the running mean of every
    class, for evaluation by nearest centre."""

    margins: dict[str, float] = Field(default_factory=dict)
    """Numbers of a margin loss that differ from its paper's, by name: `{margin: 0.4}` for cosface."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread evenly over all classes."""

    softmax: SoftmaxConfig = Field(default_factory=SoftmaxConfig)
    center: CenterConfig = Field(default_factory=CenterConfig)
    triplet: TripletConfig = Field(default_factory=TripletConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    standalone_center: StandaloneCenterConfig = Field(default_factory=StandaloneCenterConfig)

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of every term. Terms without rows get centres, of weight 0, to be evaluated by."""
        terms: dict[str, float] = {"softmax" if self.name == "center" else self.name: 1.0}
        for name, weight in self.extra.items():
            terms[name] = weight
        if self.name == "center" or not terms.keys() - ROWLESS:
            terms["center"] = self.center.weight if self.name == "center" else 0.0
        if "center" in terms:  # the last to judge: its centres follow the images, and may have no weight
            terms["center"] = terms.pop("center")
        return terms

    @property
    def judge(self) -> str:
        """The term whose rows stand for the classes: the first that has any."""
        return next(name for name in self.weights if name not in ROWLESS)


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

    cache_mib: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Memory per rank in which the fused head keeps exponentials, to save computing them again. None keeps
    what a step may hold beside its rows below 128 MiB: 80 MiB for 256 images of all ranks in float32."""

    lr_multiplier: Positive = 1.0
    """Learning rate of the head relative to `optim.lr`."""

    weight_decay: NotNegative = 0.0
    """Weight decay of the head. COCO does not see the length of its rows; decay only keeps it in bounds."""


@section
class InitConfig:
    """Where the weights of a new run come from; one that goes on has them from its checkpoint."""

    from_: Path | None = Field(default=None, alias="from")
    """A run, a checkpoint, or a safetensors file of a backbone (ours or timm's): its weights. None draws
    them from the seed, or takes `backbone.pretrained`."""

    head: bool = False
    """Take the head's rows from there too; the classes have to be the same, in the same order."""

    centroids: Literal["random", "class_means"] = "random"
    """`class_means`: one pass over the data, and every centroid begins as the mean feature of its class.
    Of use with a backbone that is trained already, and with very many classes."""


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

    epochs: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
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
    """A collective that waits longer ends every rank with an error that names the ranks it waited for.
    A data worker that is stuck in a read for so long ends the run too."""

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
class ProtocolConfig:
    """A published way to judge a model, and what it is judged on. Folders may be packed, hold images, or hold
    what `launch/embed.py` wrote."""

    protocol: Literal[
        "closed_set", "pairs", "open_set", "identification", "distractors", "reid", "persons", "retrieval",
        "few_shot",
    ]  # fmt: skip
    """`closed_set` nearest centroid; `pairs` listed pairs as LFW; `open_set` all pairs; `identification` 1:N
    with strangers as IJB; `distractors` as MegaFace; `reid` as Market-1501; `persons` as PIPA; `retrieval`
    recall@k and MAP@R; `few_shot` n-way k-shot."""

    data: Path
    """The images to judge: probes, queries, or all there are. For `persons` the album."""

    gallery: Path | None = None
    """`closed_set`: what class means are made of (None: the head's rows). `identification`, `reid`,
    `retrieval`: what is searched; None, for `retrieval` only, searches the data itself."""

    distractors: Path | None = None
    """Images of nobody among the probes."""

    pairs: Path | None = None
    """LFW's `pairs.txt`, or a CSV `key1,key2,same[,fold]`. None takes `pairs.csv` or `pairs.txt` of
    the data."""

    notes: Path | None = None
    """CSV `key,person,camera,template,media` of the data; None takes KEY.json of the shards."""

    gallery_notes: Path | None = None
    """The same for the gallery."""

    flip: bool = False
    """Add the embedding of the mirror image."""

    template: bool = False
    """Pool the images of a template (a note), media first, into one feature."""

    rerank: bool = False
    """k-reciprocal re-ranking (k1 20, k2 6, lambda 0.3)."""

    ks: tuple[PositiveInt, ...] | None = None
    """Depths of top-k, rank-k and recall@k. None takes the protocol's own."""

    fars: tuple[Rate, ...] | None = None
    """False accept rates; one that the impostors cannot support (fewer than ten errors) is refused. None
    takes 1e-1 to 1e-6 as far as supported."""

    fpirs: tuple[Rate, ...] | None = None
    """False positive identification rates; one that the searches without a mate cannot support is refused.
    None takes 1e-1, 1e-2 and 1e-3 as far as supported."""

    sizes: tuple[PositiveInt, ...] | None = None
    """Numbers of distractors, rising. None takes 10, 100, ... and all."""

    ways: PositiveInt = 20
    """Classes of an episode."""

    shots: PositiveInt = 1
    """Examples of each class."""

    queries: PositiveInt = 1
    """Queries of each class."""

    episodes: PositiveInt = 1000
    """Random episodes."""

    within: bool = False
    """Draw the classes of an episode from those with the same first part of the name (alphabet/character)."""

    splits: tuple[Literal["original", "album", "time", "day"], ...] = ("original", "album", "time", "day")
    """Splits of the album; weights of regions are found on the validation files of the same split."""

    regions: dict[Region, Path | None] = Field(default_factory=lambda: _HEAD_ONLY)
    """Region of a person -> run whose model judges it; None is the model that is being judged."""

    bootstrap: NotNegativeInt = 0
    """Resamples of identities for a 95 % interval beside figures (`NAME_low`, `NAME_high`); 0 has none."""

    missing: Literal["error", "count"] = "error"
    """An image that cannot be decoded, or a pair whose image is not there: an error that names it, or left
    out and counted."""


@section
class EvalConfig:
    """Test sets by name, and when they are looked at. Metrics are named `eval/<set>/<metric>`. A YAML file's
    sets go with its data: naming another `data.train` on the command line drops them."""

    classification: dict[str, Location] = Field(default_factory=dict)
    """Sets whose classes are those of training: accuracy by nearest centroid."""

    verification: dict[str, Location] = Field(default_factory=dict)
    """Sets of unseen classes: all-pairs verification and leave-one-out identification."""

    protocols: dict[str, ProtocolConfig] = Field(default_factory=dict)
    """Protocols by name, as `launch/evaluate.py --protocol` has them; its `--help` lists their fields."""

    every_steps: PositiveInt | None = None
    """Evaluate every so many steps. None evaluates only at the end."""

    batch_size: PositiveInt = 256
    """Images of one evaluation batch, over all ranks."""

    save_embeddings: bool = False
    """Keep `embeddings/<set>-<step>.safetensors` of every evaluation in the run's folder, to draw how
    features move: `launch/pictures.py`."""


@section
class LogConfig:
    """What is written, how often and where to."""

    every_steps: PositiveInt = 10
    """Steps between two lines of metrics.jsonl, the console and W&B."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """W&B mode. `offline` needs no account; `wandb sync` uploads it later. W&B never stops a run."""

    wandb_project: str = "coco-trainer"
    """Project of the run in W&B."""

    report: bool = True
    """Write `report.html` into the run's folder at the end; `launch/report.py` does it at any time."""

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
    init: InitConfig = Field(default_factory=InitConfig)
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
_PROTOCOL = TypeAdapter(ProtocolConfig)


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
    return _ADAPTER.dump_python(config, mode="json", by_alias=True)


def protocol_from_dict(tree: Mapping[str, Any]) -> ProtocolConfig:
    """Check the fields of a protocol. Raises InvalidConfigError."""
    try:
        return _PROTOCOL.validate_python(tree)
    except ValidationError as error:
        raise InvalidConfigError(error.errors()) from None


def field_infos(cls: type) -> dict[str, FieldInfo]:
    """Return name -> type, default and docstring of every field of a section."""
    infos = cast(dict[str, FieldInfo], cls.__pydantic_fields__)  # type: ignore[attr-defined]
    return {info.alias or name: info for name, info in infos.items()}  # `from` is a word of Python's
