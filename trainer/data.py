"""Batches of images from an index: the same global batches on any number of ranks and workers.

An item of the loader is (epoch, position, sample), and everything about it, augmentation included, is a
function of (seed, epoch, position). So a worker has no state, and the state of the whole loader is one
``Position``. It is counted where batches arrive: what workers have prefetched does not count.

A sample that cannot be read is handed over as a value: an exception would leave the worker with a traceback
for its message. Shapes: N images of this rank, C channels, H height, W width.
"""

import hashlib
import struct
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.augment import Transform, decode, random_state_kept, seed_generators
from trainer.errors import UserError
from trainer.index import Index
from trainer.order import Position, epoch_order, rank_positions, sample_key
from trainer.signals import ignore_in_worker

PADDING_LABEL = -1


class Batch(NamedTuple):
    """The images of one step on one rank."""

    images_NCHW: Tensor
    """uint8; the backbone normalises."""
    labels_N: Tensor
    """int64; -1 for padding, which no class can equal."""
    valid_N: Tensor
    """bool; False for padding, which only evaluation has."""
    digests_N: Tensor | None
    """int64; their wrapped sum over a global batch is its digest, whatever the ranks and their order."""


class _Item(NamedTuple):
    epoch: int
    position: int
    sample: int


class _Sample(NamedTuple):
    image_CHW: Tensor
    label: int
    valid: bool
    digest: int | None


class _Failure(NamedTuple):
    message: str


def build_train_loader(
    index: Index,
    transform: Transform,
    *,
    channels: int,
    global_batch: int,
    accumulation: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    start: Position,
    with_digests: bool = False,
) -> Generator[tuple[Batch, Position], None, None]:
    """Return an endless iterator over steps: (this rank's batch, the position after the step).

    A batch holds the rank's micro-batches one after another. The same position comes on every rank. Workers
    start at once, and end with ``close()`` or when the iterator is dropped. Raises UserError if the global
    batch does not fit ranks, accumulation or data, and in the iterator for a sample that cannot be read.
    """
    _check_batch(index, global_batch, accumulation, world_size)
    start = start.normalised(global_batch, index.num_samples)
    samples = _TrainSamples(index, transform, channels, rank, seed, with_digests)
    plan = _TrainPlan(index.num_samples, seed, global_batch, accumulation, rank, world_size, start)
    return _steps(iter(_loader(samples, plan, workers)), start, global_batch, index.num_samples)


def build_eval_loader(
    index: Index,
    transform: Transform,
    *,
    channels: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
) -> "EvalLoader":
    """Return this rank's share of one pass in the data set's order; ``batch_size`` images over all ranks.

    Every sample comes once, over all ranks. Every rank gets the same number of batches of the same size (the
    batch rounded up to a multiple of the ranks), so collectives match; the end is padded with valid = False.
    The batches of all ranks, one after another, are a slice of the data set.
    """
    samples = _EvalSamples(index, transform, channels, rank)
    plan = _EvalPlan(index.num_samples, -(-batch_size // world_size), rank, world_size)
    return EvalLoader(_loader(samples, plan, workers))


class EvalLoader:
    """Iterates over one pass, as often as asked. ``build_eval_loader`` makes one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _unwrapped(iter(self._loader))


@dataclass(frozen=True)
class _TrainPlan:
    """The items of this rank, step after step, for ever."""

    num_samples: int
    seed: int
    global_batch: int
    accumulation: int
    rank: int
    world_size: int
    start: Position

    def __iter__(self) -> Iterator[list[_Item]]:
        position = self.start
        while True:
            epoch = position.epoch
            order = epoch_order(self.num_samples, self.seed, epoch)
            while position.epoch == epoch:
                mine = rank_positions(
                    position.consumed,
                    global_batch=self.global_batch,
                    accumulation=self.accumulation,
                    rank=self.rank,
                    world_size=self.world_size,
                )
                yield [
                    _Item(epoch, i, sample)
                    for i, sample in zip(mine.tolist(), order[mine].tolist(), strict=True)
                ]
                position = position.advance(self.global_batch, self.num_samples)


@dataclass(frozen=True)
class _EvalPlan:
    """The positions of this rank, batch after batch; those from ``num_samples`` on are padding."""

    num_samples: int
    local_batch: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-self.num_samples // (self.local_batch * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            first = (step * self.world_size + self.rank) * self.local_batch
            yield list(range(first, first + self.local_batch))


class _TrainSamples(Dataset[_Sample | _Failure]):
    def __init__(
        self, index: Index, transform: Transform, channels: int, rank: int, seed: int, with_digests: bool
    ) -> None:
        self.index, self.transform, self.channels = index, transform, channels
        self.rank, self.seed, self.with_digests = rank, seed, with_digests

    def __getitem__(self, item: _Item) -> _Sample | _Failure:
        image_CHW = _read(self.index, item.sample, self.channels, self.rank)
        if isinstance(image_CHW, _Failure):
            return image_CHW
        seed_generators(sample_key(self.seed, item.epoch, item.position))
        image_CHW = self.transform(image_CHW)
        label = int(self.index.labels_N[item.sample])
        return _Sample(image_CHW, label, True, _digest(item, image_CHW, label) if self.with_digests else None)


class _EvalSamples(Dataset[_Sample | _Failure]):
    def __init__(self, index: Index, transform: Transform, channels: int, rank: int) -> None:
        self.index, self.transform, self.channels, self.rank = index, transform, channels, rank

    def __getitem__(self, position: int) -> _Sample | _Failure:
        valid = position < self.index.num_samples
        sample = position if valid else 0  # padding has to look like an image
        image_CHW = _read(self.index, sample, self.channels, self.rank)
        if isinstance(image_CHW, _Failure):
            return image_CHW
        label = int(self.index.labels_N[sample]) if valid else PADDING_LABEL
        return _Sample(self.transform(image_CHW), label, valid, None)


def _loader(samples: Dataset[Any], plan: Any, workers: int) -> DataLoader[Any]:
    return DataLoader(
        samples,
        batch_sampler=plan,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        collate_fn=_collate,
        generator=torch.Generator(),  # else the loader draws from the caller's
    )


def _read(index: Index, sample: int, channels: int, rank: int) -> Tensor | _Failure:
    try:
        return decode(index.read(sample), channels)
    except UserError as error:
        return _Failure(f"rank {rank}: {error}")
    except ValueError as error:
        return _Failure(f"rank {rank}: {index.describe(sample)}: {error}")


def _digest(item: _Item, image_CHW: Tensor, label: int) -> int:
    digest = hashlib.blake2b(struct.pack("<qqq", item.epoch, item.position, label), digest_size=8)
    digest.update(image_CHW.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _collate(samples: Sequence[_Sample | _Failure]) -> Batch | _Failure:
    good = [sample for sample in samples if isinstance(sample, _Sample)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, _Failure))
    digests = [sample.digest for sample in good if sample.digest is not None]
    return Batch(
        images_NCHW=torch.stack([sample.image_CHW for sample in good]),
        labels_N=torch.tensor([sample.label for sample in good]),
        valid_N=torch.tensor([sample.valid for sample in good]),
        digests_N=torch.tensor(digests) if digests else None,
    )


def _unwrapped(batches: Iterator[Batch | _Failure]) -> Iterator[Batch]:
    """Yield the batches; raise UserError for one that could not be read, after ending the workers."""
    while True:
        with random_state_kept():  # without workers, augmentation draws in this process
            batch = next(batches, None)
        if batch is None:
            return
        if isinstance(batch, _Failure):
            del batches  # if the traceback kept it, ending the workers would wait 5 s for a time-out
            raise UserError(batch.message)
        yield batch


def _steps(
    batches: Iterator[Batch | _Failure], position: Position, global_batch: int, num_samples: int
) -> Generator[tuple[Batch, Position], None, None]:
    unwrapped = _unwrapped(batches)
    del batches
    for batch in unwrapped:
        position = position.advance(global_batch, num_samples)
        yield batch, position


def _check_batch(index: Index, global_batch: int, accumulation: int, world_size: int) -> None:
    if global_batch % (accumulation * world_size):
        raise UserError(
            f"data.batch_size is {global_batch}, which is not divisible by {world_size} ranks x "
            f"engine.accumulation_steps {accumulation}"
        )
    if global_batch > index.num_samples:
        raise UserError(
            f"data.batch_size is {global_batch} but {index.field} holds {index.num_samples} images"
        )
