"""Batches of images from an index: the same global batches on any number of ranks and workers.

An item is (epoch, position, sample), and everything about it, augmentation and what replaces it if it is
bad included, is a function of (seed, epoch, position). So a worker has no state, and the state of the whole
loader is one ``Position``. It is counted where batches arrive: what workers have prefetched does not count.

A worker makes a whole batch: it reads the samples in the order in which they lie and decodes them one after
another into one array. What cannot be read is handed over as a value: an exception would leave the worker
with a traceback for its message. Shapes: N images of this rank, C channels, H height, W width.
"""

import hashlib
import struct
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.augment import Transform, random_state_kept, seed_generators
from trainer.decode import decode
from trainer.errors import UserError
from trainer.forks import ForkUntilAlive, bounded
from trainer.index import ShardStore
from trainer.ledger import BadSample, Ledger
from trainer.order import Order, Position, rank_positions, sample_key
from trainer.samplers import PlainOrder, ShuffledOrder
from trainer.signals import ignore_in_worker

PADDING_LABEL = -1
MAX_REPLACEMENTS = 20  # one after another, all bad: then the data is
_GRACE_SECONDS = 5.0  # for torch's own time-out, which knows more


class Samples(Protocol):
    """What is needed of an index (``trainer.index``), or of several as one (``trainer.mixture``)."""

    @property
    def field(self) -> str:
        """Begins messages."""

    @property
    def num_samples(self) -> int:
        """N."""

    @property
    def labels_N(self) -> Any:
        """Label of every sample."""

    @property
    def store(self) -> ShardStore | None:
        """Keeps shards that are elsewhere."""

    def read_many(self, samples: Sequence[int]) -> list[bytes]:
        """Return the bytes of images in the order asked. Raises UserError."""

    def describe(self, i: int) -> str:
        """Return where a sample is, for messages."""

    def locate(self, i: int) -> tuple[str, int]:
        """Return the shard and the byte where the image of a sample begins."""

    def member_name(self, i: int) -> str:
        """Return its name in the shard."""


class Batch(NamedTuple):
    """The images of one step on one rank."""

    images_NCHW: Tensor
    """uint8, in memory channels last; the backbone normalises."""
    labels_N: Tensor
    """int64; -1 for padding, which no class can equal."""
    valid_N: Tensor
    """bool; False for padding, which only evaluation has."""
    digests_N: Tensor | None
    """int64; their wrapped sum over a global batch is its digest, whatever the ranks and their order."""
    bad: tuple[BadSample, ...] = ()
    """What was replaced."""


class _Item(NamedTuple):
    epoch: int
    position: int
    sample: int


class Failure(NamedTuple):
    """Why there is no batch."""

    message: str


def build_train_loader(
    index: Samples,
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
    order: Order | None = None,
    smallest_side: int | None = None,
    ledger: Ledger | None = None,
    quarantine: frozenset[int] = frozenset(),
    with_digests: bool = False,
    timeout_seconds: float = 600.0,
) -> Generator[tuple[Batch, Position], None, None]:
    """Return an endless iterator over steps: (this rank's batch, the position after the step).

    A batch holds the rank's micro-batches one after another. The same position comes on every rank. Workers
    start at once, and end with ``close()`` or when the iterator is dropped. The order is ShuffledOrder if
    none is given; ``smallest_side`` is that of ``decode``. With a ledger an image that cannot be decoded is
    replaced and written there, else it is the end; what is in ``quarantine`` is replaced unseen. Raises
    UserError if the global batch does not fit ranks, accumulation or data, and in the iterator for a sample
    that cannot be read, or for too many bad ones.
    """
    order = order or ShuffledOrder(index.num_samples, seed)
    _check_batch(index, order.num_positions, global_batch, accumulation, world_size)
    start = start.normalised(global_batch, order.num_positions)
    samples = _TrainSamples(
        _Reader(index, transform, channels, rank, smallest_side),
        order=order,
        seed=seed,
        replace=ledger is not None,
        quarantine=quarantine,
        with_digests=with_digests,
    )
    plan = _TrainPlan(order, global_batch, accumulation, rank, world_size, start)
    batches = iter(build_loader(samples, plan, workers, timeout_seconds))
    return _steps(batches, start, global_batch, order.num_positions, ledger)


def build_eval_loader(
    index: Samples,
    transform: Transform,
    *,
    channels: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    timeout_seconds: float = 600.0,
) -> "EvalLoader":
    """Return this rank's share of one pass in the data set's order; ``batch_size`` images over all ranks.

    Every sample comes once, over all ranks. Every rank gets the same number of batches of the same size (the
    batch rounded up to a multiple of the ranks), so collectives match; the end is padded with valid = False.
    The batches of all ranks, one after another, are a slice of the data set.
    """
    samples = _EvalSamples(_Reader(index, transform, channels, rank, None))
    plan = _EvalPlan(index.num_samples, -(-batch_size // world_size), rank, world_size)
    return EvalLoader(build_loader(samples, plan, workers, timeout_seconds))


class EvalLoader:
    """Iterates over one pass, as often as asked. ``build_eval_loader`` makes one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return batches_or_error(iter(self._loader))


@dataclass(frozen=True)
class _TrainPlan:
    """The items of this rank, step after step, for ever."""

    order: Order
    global_batch: int
    accumulation: int
    rank: int
    world_size: int
    start: Position

    def __iter__(self) -> Iterator[list[_Item]]:
        position = self.start
        while True:
            epoch = position.epoch
            samples_of = self.order.of_epoch(epoch)
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
                    for i, sample in zip(mine.tolist(), samples_of(mine).tolist(), strict=True)
                ]
                position = position.advance(self.global_batch, self.order.num_positions)


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


@dataclass(frozen=True)
class _Reader:
    """From samples to images of one shape, put into one array."""

    index: Samples
    transform: Transform
    channels: int
    rank: int
    smallest_side: int | None

    def expect(self, epoch: int, position: int, order: Order) -> None:
        """Tell the store of remote shards what is read now: it keeps, and fetches, what is needed next."""
        if (store := self.index.store) is not None:
            store.expect(epoch, position, order)
            if (worker := get_worker_info()) is None or worker.id == 0:
                store.fetch_ahead()

    def read_many(self, samples: Sequence[int]) -> list[bytes] | Failure:
        try:
            return self.index.read_many(samples)
        except UserError as error:
            return Failure(f"rank {self.rank}: {error}")

    def decode(self, image_bytes: bytes) -> Tensor:
        return decode(image_bytes, self.channels, self.smallest_side)

    def failure(self, sample: int, error: ValueError) -> Failure:
        return Failure(f"rank {self.rank}: {self.index.describe(sample)}: {error}")


class _TrainSamples(Dataset[Batch | Failure]):
    """The "index" of this data set is the items of a whole step."""

    def __init__(
        self,
        reader: _Reader,
        *,
        order: Order,
        seed: int,
        replace: bool,
        quarantine: frozenset[int],
        with_digests: bool,
    ) -> None:
        self.reader, self.order, self.seed = reader, order, seed
        self.replace, self.quarantine, self.with_digests = replace, quarantine, with_digests

    def __getitem__(self, items: list[_Item]) -> Batch | Failure:
        self.reader.expect(items[0].epoch, items[0].position, self.order)
        contents = self.reader.read_many([item.sample for item in items])
        if isinstance(contents, Failure):
            return contents
        images, labels, digests = _Images(len(items)), [], []
        bad: list[BadSample] = []
        for item, content in zip(items, contents, strict=True):
            found = self._decoded(item, content, bad)
            if isinstance(found, Failure):
                return found
            sample, image_CHW = found
            seed_generators(sample_key(self.seed, item.epoch, item.position))
            image_CHW = self.reader.transform(image_CHW)
            labels.append(int(self.reader.index.labels_N[sample]))
            images.append(image_CHW)
            if self.with_digests:
                digests.append(_digest(item, image_CHW, labels[-1]))
        return Batch(
            images.images_NCHW,
            torch.tensor(labels),
            torch.ones(len(items), dtype=torch.bool),
            torch.tensor(digests) if digests else None,
            tuple(bad),
        )

    def _decoded(self, item: _Item, content: bytes, bad: list[BadSample]) -> tuple[int, Tensor] | Failure:
        """Return the item's sample, or the first good one of those that may replace it, and its pixels."""
        sample = item.sample
        for attempt in range(MAX_REPLACEMENTS):
            try:
                if sample not in self.quarantine:
                    return sample, self.reader.decode(content)
            except ValueError as error:
                if not self.replace:
                    return self.reader.failure(sample, error)
                bad.append(self._describe(item, sample, str(error)))
            sample = self.order.substitute(sample, item.epoch, item.position, attempt)
            contents = self.reader.read_many([sample])
            if isinstance(contents, Failure):
                return contents
            (content,) = contents
        return self.reader.failure(sample, ValueError(f"{MAX_REPLACEMENTS} replacements in a row are bad"))

    def _describe(self, item: _Item, sample: int, reason: str) -> BadSample:
        shard, offset = self.reader.index.locate(sample)
        key = self.reader.index.member_name(sample)
        return BadSample(shard, offset, key, reason, item.epoch, item.position)


class _EvalSamples(Dataset[Batch | Failure]):
    """The "index" of this data set is the positions of a whole step."""

    def __init__(self, reader: _Reader) -> None:
        self.reader, self.order = reader, PlainOrder(reader.index.num_samples)

    def __getitem__(self, positions: list[int]) -> Batch | Failure:
        index = self.reader.index
        self.reader.expect(0, positions[0], self.order)
        valid = [position < index.num_samples for position in positions]
        samples = [position if good else 0 for position, good in zip(positions, valid, strict=True)]
        contents = self.reader.read_many(samples)  # padding has to look like an image
        if isinstance(contents, Failure):
            return contents
        images = _Images(len(samples))
        for sample, content in zip(samples, contents, strict=True):
            try:
                images.append(self.reader.transform(self.reader.decode(content)))
            except ValueError as error:
                return self.reader.failure(sample, error)
        valid_N, labels_N = torch.tensor(valid), torch.from_numpy(index.labels_N[samples].astype("int64"))
        return Batch(images.images_NCHW, labels_N.masked_fill(~valid_N, PADDING_LABEL), valid_N, None)


class _Images:
    """The images of a batch, put one by one into an array that is channels last, as decoders write."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self.images_NCHW = torch.empty(0, dtype=torch.uint8)

    def append(self, image_CHW: Tensor) -> None:
        if self._filled == 0:
            shape = (self._count, *image_CHW.shape)
            self.images_NCHW = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        self.images_NCHW[self._filled].copy_(image_CHW)
        self._filled += 1


def build_loader(
    batches: Dataset[Any], plan: Any, workers: int, timeout_seconds: float = 600.0
) -> DataLoader[Any]:
    """Return torch's loader of whole batches that ``workers`` make; ``plan`` is None for an IterableDataset.

    A batch that takes ``timeout_seconds`` raises RuntimeError: its worker is stuck. One that is frozen as a
    whole is found a few seconds later.
    """
    return _Loader(
        batches,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader draws from the caller's
        timeout=timeout_seconds if workers else 0,
        multiprocessing_context=ForkUntilAlive() if workers else None,
    )


class _Loader(DataLoader[Any]):
    """torch's, whose time-out does not cover a worker that is frozen while it hands over its batch."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return bounded(batches, self.timeout + _GRACE_SECONDS) if self.num_workers else batches


def _as_it_is(batch: Any) -> Any:
    return batch


def _digest(item: _Item, image_CHW: Tensor, label: int) -> int:
    digest = hashlib.blake2b(struct.pack("<qqq", item.epoch, item.position, label), digest_size=8)
    digest.update(image_CHW.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def batches_or_error(batches: Iterator[Batch | Failure]) -> Iterator[Batch]:
    """Yield the batches; raise UserError for one that could not be read, after ending the workers."""
    while True:
        with random_state_kept():  # without workers, augmentation draws in this process
            batch = next(batches, None)
        if batch is None:
            return
        if isinstance(batch, Failure):
            del batches  # if the traceback kept it, ending the workers would wait 5 s for a time-out
            raise UserError(batch.message)
        yield batch


def _steps(
    batches: Iterator[Batch | Failure],
    position: Position,
    global_batch: int,
    num_positions: int,
    ledger: Ledger | None,
) -> Generator[tuple[Batch, Position], None, None]:
    unwrapped = batches_or_error(batches)
    del batches
    for batch in unwrapped:
        for bad in batch.bad:
            assert ledger is not None
            ledger.add(bad)
        position = position.advance(global_batch, num_positions)
        yield batch, position


def _check_batch(
    index: Samples, num_positions: int, global_batch: int, accumulation: int, world_size: int
) -> None:
    if global_batch % (accumulation * world_size):
        raise UserError(
            f"data.batch_size is {global_batch}, which is not divisible by {world_size} ranks x "
            f"engine.accumulation_steps {accumulation}"
        )
    if global_batch > num_positions:
        raise UserError(f"data.batch_size is {global_batch} but {index.field} holds {num_positions} images")
