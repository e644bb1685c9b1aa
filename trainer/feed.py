"""From a configuration to training data: what is opened, in which order it is seen, and its batches.

The one place that knows both ``DataConfig`` and the modules that read. Every rank calls everything here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from trainer.address import Url
from trainer.augment import Transform, build_eval_transform, build_train_transform
from trainer.backbone import image_size_of
from trainer.cache import open_data_set, read_together
from trainer.collectives import concatenate_over
from trainer.config import Config, to_dict
from trainer.data import Batch, EvalLoader, Samples, build_eval_loader, build_train_loader
from trainer.distributed import World
from trainer.errors import UserError
from trainer.index import Index
from trainer.ledger import Ledger, read_quarantine
from trainer.mixture import Mixture, mix
from trainer.order import Order, Position
from trainer.samplers import BalancedOrder, ShuffledOrder, mixed, order_digest, weighted_by_class
from trainer.stream import StreamSource, build_stream_loader, find_shards


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on."""

    index: Index | Mixture | None
    """None for the stream reader, as is the order."""
    order: Order | None
    num_classes: int
    class_names: tuple[str, ...]
    num_samples: int
    """Images of an epoch."""
    fingerprint: str
    """Of the data, and of what decides their order besides the seed."""
    shards: tuple[Path | Url, ...] = ()
    """Of the stream reader."""


def open_training_data(config: Config) -> TrainingData:
    """Open what ``data`` describes; communicates nothing. Raises UserError."""
    data = config.data
    if data.reader == "stream":
        return _open_stream(config)
    first = open_data_set(data.train, "data.train", data)
    index: Index | Mixture = first
    if data.mix:
        others = [open_data_set(place, f"data.mix.{place}", data) for place in data.mix]
        names = [Path(str(place)).name for place in (data.train, *data.mix)]
        index = mix(read_together([first, *others]), data.mix_labels, names)
    order = build_order(config, index)
    return TrainingData(
        index, order, index.num_classes, index.class_names, order.num_positions, fingerprint_of(config, index)
    )


def with_derived_fields(config: Config, data: TrainingData) -> Config:
    """Fill in what the data decides: number of classes, number of steps. Raises UserError."""
    num_classes = config.head.num_classes or data.num_classes
    if num_classes < 2:
        raise UserError(f"data.train: {config.data.train} has one class; a head tells two or more apart")
    if data.num_classes > num_classes:
        raise UserError(
            f"head.num_classes: is {num_classes}, but data.train has label {data.num_classes - 1} "
            f"({config.data.train})"
        )
    steps_per_epoch = data.num_samples // config.data.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} is more than the {data.num_samples} images "
            f"of {config.data.train}"
        )
    steps = config.optim.steps or max(1, round(steps_per_epoch * (config.optim.epochs or 0)))
    dead_after = config.head.dead_after_steps or 2 * steps_per_epoch
    return dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, num_classes=num_classes, dead_after_steps=dead_after),
        optim=dataclasses.replace(config.optim, steps=steps, epochs=None),
    )


def build_order(config: Config, index: Index | Mixture) -> Order:
    """Build the order that ``data.sampler`` and ``data.mix`` ask for. Raises UserError."""
    data = config.data
    if isinstance(index, Mixture):
        return mixed([part.num_samples for part in index.parts], [1.0, *data.mix.values()], config.seed)
    if data.sampler == "balanced":
        micro_batch = data.batch_size // config.engine.accumulation_steps
        groups, rest = divmod(micro_batch, data.samples_per_class)
        if rest:
            raise UserError(
                f"data.samples_per_class: {data.samples_per_class} does not divide the {micro_batch} images "
                "of a micro-batch over all ranks"
            )
        return BalancedOrder(index.labels_N, config.seed, groups, data.samples_per_class)
    if data.sampler == "class_weighted":
        return weighted_by_class(index.labels_N, config.seed, data.class_power)
    if data.shuffle_window is None:
        return ShuffledOrder(index.num_samples, config.seed)
    first_of_windows = [*index.starts[: -1 : data.shuffle_window].tolist(), index.num_samples]
    return ShuffledOrder(index.num_samples, config.seed, tuple(first_of_windows))


def build_batches(
    config: Config, data: TrainingData, world: World, start: Position
) -> Generator[tuple[Batch, Position], None, None]:
    """Build the endless iterator over this rank's training batches from ``start`` on. Raises UserError."""
    options, ledger = config.data, None
    if data.index is None:
        return _build_stream(config, data, world, start)
    if options.sampler == "balanced":
        _require_whole_groups(config, world)
    if options.on_bad_sample == "replace":
        ledger = Ledger(
            config.run_folder / "bad_samples",
            rank=world.rank,
            world_size=world.size,
            num_samples=data.index.num_samples,
            max_bad_fraction=options.max_bad_fraction,
        )
    quarantine = options.quarantine
    return build_train_loader(
        data.index,
        build_transform(config),
        channels=config.backbone.channels,
        global_batch=options.batch_size,
        accumulation=config.engine.accumulation_steps,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        workers=options.workers,
        start=start,
        order=data.order,
        smallest_side=smallest_side(config),
        ledger=ledger,
        quarantine=read_quarantine(quarantine, data.index.find) if quarantine else frozenset(),
        with_digests=options.log_batch_digest,
        timeout_seconds=config.engine.timeout_seconds,
    )


def _open_stream(config: Config) -> TrainingData:
    assert config.head.num_classes is not None
    assert config.data.epoch_images is not None
    shards = find_shards(config.data.train)
    names = " ".join(
        str(shard) if isinstance(shard, Url) else f"{shard.name} {shard.stat().st_size}" for shard in shards
    )
    fingerprint = hashlib.sha256(names.encode()).hexdigest()
    return TrainingData(
        None, None, config.head.num_classes, (), config.data.epoch_images, fingerprint, shards
    )


def _build_stream(
    config: Config, data: TrainingData, world: World, start: Position
) -> Generator[tuple[Batch, Position], None, None]:
    source = StreamSource(
        shards=data.shards,
        num_classes=data.num_classes,
        channels=config.backbone.channels,
        shuffle_buffer=config.data.stream_buffer,
        smallest_side=smallest_side(config),
        seed=config.seed,
    )
    return build_stream_loader(
        source,
        build_transform(config),
        global_batch=config.data.batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        start=start,
        epoch_images=data.num_samples,
        timeout_seconds=config.engine.timeout_seconds,
    )


def build_transform(config: Config) -> Transform:
    """Build the random transform of training."""
    augment = config.augment
    return build_train_transform(
        image_size=image_size_of(config.backbone),
        crop_scale=augment.crop_scale,
        flip_probability=augment.flip,
        rotate_degrees=augment.rotate_degrees,
        shift_fraction=augment.shift,
        scale_range=augment.zoom,
        color_jitter=augment.color_jitter,
        erase_probability=augment.erase,
        rand_augment=augment.rand_augment,
        low_resolution_probability=augment.low_resolution,
        occlusion_probability=augment.occlusion,
    )


def build_eval_batches(config: Config, index: Samples, world: World) -> EvalLoader:
    """Build one pass over a data set in its order, without augmentation: this rank's share."""
    return build_eval_loader(
        index,
        build_eval_transform(image_size=image_size_of(config.backbone)),
        channels=config.backbone.channels,
        batch_size=config.eval.batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        timeout_seconds=config.engine.timeout_seconds,
    )


def smallest_side(config: Config) -> int | None:
    """Return how small ``data.reduced_decode`` may make an image: its smallest crop is not enlarged."""
    if not config.data.reduced_decode:
        return None
    smallest_area = config.augment.crop_scale[0] if config.augment.crop_scale else 1.0
    # A crop's shorter side is the root of 3/4 of its area: its sides are at most 4 to 3.
    shrunk = (0.75 * smallest_area) ** 0.5 if config.augment.crop_scale else 1.0
    return int(-(-image_size_of(config.backbone) // shrunk))


def require_same_data(config: Config, data: TrainingData, world: World) -> None:
    """Raise UserError, on every rank, if some see other data, another order or another configuration.

    They would train on different things, or wait for each other for ever.
    """
    settings = {name: value for name, value in to_dict(config).items() if name not in ("run", "log")}
    facts = {
        "data.train: the data": data.fingerprint,
        "seed, data.sampler: the order of the data": order_digest(data.order, epoch=0) if data.order else "",
        "the configuration": json.dumps(settings, sort_keys=True),
    }
    require_agreement(facts, world.group, world.device)


def require_agreement(facts: dict[str, str], group: ProcessGroup, device: torch.device) -> None:
    """Raise UserError, on every rank, naming the ranks for which a fact is not what it is for the most.

    Every rank must call it with the same names.
    """
    digests = [
        int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big", signed=True) for f in facts.values()
    ]
    of_ranks = concatenate_over(torch.tensor([digests], device=device), group).tolist()
    for name, seen in zip(facts, zip(*of_ranks, strict=True), strict=True):
        usual = max(seen, key=seen.count)  # of two ranks, what rank 0 sees
        if others := [str(rank) for rank, value in enumerate(seen) if value != usual]:
            raise UserError(
                f"{name} of rank {', '.join(others)} is not that of the other ranks; do all hosts see the "
                "same files and the same command?"
            )


def _require_whole_groups(config: Config, world: World) -> None:
    share = config.data.batch_size // (config.engine.accumulation_steps * world.size)
    if share % config.data.samples_per_class:
        raise UserError(
            f"data.samples_per_class: {config.data.samples_per_class} does not divide the {share} images of "
            f"a rank's micro-batch (data.batch_size {config.data.batch_size} over {world.size} ranks)"
        )


def fingerprint_of(config: Config, index: Index | Mixture) -> str:
    """Return the data's own for shuffled data, else a hash of that and of what decides the order."""
    data = config.data
    decisive = {
        "sampler": data.sampler if data.sampler != "shuffled" else None,
        "groups": (data.batch_size // config.engine.accumulation_steps, data.samples_per_class)
        if data.sampler == "balanced"
        else None,
        "power": data.class_power if data.sampler == "class_weighted" else None,
        "window": data.shuffle_window,
        "weights": list(data.mix.values()) or None,
    }
    if not any(value is not None for value in decisive.values()):
        return index.fingerprint
    return hashlib.sha256((index.fingerprint + json.dumps(decisive)).encode()).hexdigest()
