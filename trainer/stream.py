"""Batches from data shards without an index, read from front to back by webdataset: the second reader.

Every worker of every rank reads shards of its own and makes whole batches of them, for ever: steps are equal
on all ranks whatever the shards hold, and nothing can hang. The shards of a pass come in an order that
changes from pass to pass, dealt to all workers of all ranks; if there are fewer shards than workers, each
worker goes through all of them in an order of its own.

What it does not promise, and the indexed reader does: an epoch is a number of images, not every image once;
batches depend on the number of ranks and workers; a run that is resumed goes on with other images.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.augment import Transform, seed_generators
from trainer.data import Batch, Failure, batches_or_error
from trainer.decode import decode
from trainer.errors import UserError
from trainer.order import Position, epoch_order, fold
from trainer.shards import require_end, stream_samples

_FOR_STREAM = 4  # see trainer.order: no draw is used twice


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """What is read, and how."""

    paths: tuple[Path, ...]
    num_classes: int
    channels: int
    shuffle_buffer: int
    smallest_side: int | None
    seed: int


def find_shards(folder: Path) -> tuple[Path, ...]:
    """Return the tars of a folder. Raises UserError if there are none, or for one that is truncated."""
    paths = tuple(sorted(folder.glob("*.tar")))
    if not paths:
        raise UserError(f"data.train: {folder} holds no .tar file")
    for path in paths:
        require_end(path)
    return paths


def build_stream_loader(
    source: StreamSource,
    transform: Transform,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    workers: int,
    start: Position,
    epoch_images: int,
) -> Generator[tuple[Batch, Position], None, None]:
    """Return an endless iterator over steps: (this rank's batch, the position after the step).

    The same position comes on every rank. Raises UserError, in the iterator too, for what cannot be read.
    """
    if global_batch % world_size:
        raise UserError(f"data.batch_size is {global_batch}, which is not divisible by {world_size} ranks")
    stream = _Stream(source, transform, global_batch // world_size, rank, world_size, start)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
    )
    position = start.normalised(global_batch, epoch_images)
    for batch in batches_or_error(iter(loader)):
        position = position.advance(global_batch, epoch_images)
        yield batch, position


class _Stream(IterableDataset[Batch | Failure]):
    def __init__(
        self,
        source: StreamSource,
        transform: Transform,
        batch: int,
        rank: int,
        world_size: int,
        start: Position,
    ) -> None:
        self.source, self.transform, self.batch = source, transform, batch
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + own, self.world_size * workers
        key = fold(_FOR_STREAM, self.source.seed, self.start.epoch, self.start.consumed, reader)
        shards = shards_of_reader(self.source.paths, self.source.seed, self.start, reader, readers)
        samples = stream_samples(shards, self.source.shuffle_buffer, key)
        try:
            for step in itertools.count():
                yield self._make_batch(list(itertools.islice(samples, self.batch)), fold(key, step))
        except UserError as error:
            yield Failure(f"rank {self.rank}: {error}")

    def _make_batch(self, samples: Sequence[tuple[str, bytes, int]], key: int) -> Batch:
        images, labels = [], []
        for i, (where, content, label) in enumerate(samples):
            if label >= self.source.num_classes:
                raise UserError(f"{where}: label {label}, but head.num_classes is {self.source.num_classes}")
            try:
                pixels_CHW = decode(content, self.source.channels, self.source.smallest_side)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            seed_generators(fold(key, i))
            images.append(self.transform(pixels_CHW))
            labels.append(label)
        return Batch(
            torch.stack(images), torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool), None
        )


def shards_of_reader(
    paths: Sequence[Path], seed: int, start: Position, reader: int, readers: int
) -> Iterator[Path]:
    """Yield the shards that one of all readers (workers of ranks) reads, pass after pass, for ever."""
    key = fold(_FOR_STREAM, seed, start.epoch, start.consumed)
    for turn in itertools.count():
        if len(paths) >= readers:
            chosen = epoch_order(len(paths), key, turn)[reader::readers]
        else:
            chosen = epoch_order(len(paths), fold(key, reader), turn)
        yield from (paths[i] for i in chosen.tolist())


def _as_it_is(batch: Any) -> Any:
    return batch
