"""Batches from data shards without an index, read from front to back by webdataset: the second reader.

Every worker of every rank reads shards of its own and makes whole batches of them, for ever: steps are equal
on all ranks whatever the shards hold, and nothing can hang. The shards of a pass come in an order that
changes from pass to pass, dealt to all workers of all ranks; if there are fewer shards than workers, each
worker goes through all of them in an order of its own.

Remote shards are not kept: each reader has one of them on its way, and goes on after a cut where it was.

What it does not promise, and the indexed reader does: an epoch is a number of images, not every image once;
batches depend on the number of ranks and workers; a run that is resumed goes on with other images.
"""

import io
import itertools
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch.utils.data import IterableDataset, get_worker_info

from trainer.address import Url
from trainer.augment import Transform, seed_generators
from trainer.data import Batch, Failure, batches_or_error, build_loader
from trainer.decode import decode
from trainer.errors import UserError
from trainer.order import Position, epoch_order, fold
from trainer.remote import stream
from trainer.remote_index import fetch_head
from trainer.shards import expand_braces, webdataset_samples
from trainer.tars import IMAGE_EXTENSIONS, read_tar, require_end

FIELD = "data.train"
_FOR_STREAM = 4  # see trainer.order: no draw is used twice


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """What is read, and how."""

    shards: tuple[Path | Url, ...]
    num_classes: int
    channels: int
    shuffle_buffer: int
    smallest_side: int | None
    seed: int


def find_shards(place: Path | Url) -> tuple[Path | Url, ...]:
    """Return the tars of a folder, or those that an address stands for.

    An address is that of a tar, or of several in braces (.../set-{000..146}.tar), else of a folder whose
    index/index.json names them. Raises UserError if there are none, or for a local one that is truncated.
    """
    if isinstance(place, Url):
        return _remote_shards(place)
    paths = tuple(sorted(place.glob("*.tar")))
    if not paths:
        raise UserError(f"{FIELD}: {place} holds no .tar file")
    for path in paths:
        require_end(path)
    return paths


def _remote_shards(place: Url) -> tuple[Url, ...]:
    parts = urlsplit(place.secret)
    if not parts.path.endswith(".tar"):
        return tuple(place.file(shard["name"]) for shard in fetch_head(place, FIELD)["shards"])
    try:
        return tuple(Url(urlunsplit(parts._replace(path=path))) for path in expand_braces(parts.path))
    except ValueError as error:
        raise UserError(f"{FIELD}: {place}: {error}") from None


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
    timeout_seconds: float = 600.0,
) -> Generator[tuple[Batch, Position], None, None]:
    """Return an endless iterator over steps: (this rank's batch, the position after the step).

    The same position comes on every rank. Raises UserError, in the iterator too, for what cannot be read.
    """
    if global_batch % world_size:
        raise UserError(f"data.batch_size is {global_batch}, which is not divisible by {world_size} ranks")
    stream = _Stream(source, transform, global_batch // world_size, rank, world_size, start)
    position = start.normalised(global_batch, epoch_images)
    for batch in batches_or_error(iter(build_loader(stream, None, workers, timeout_seconds))):
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
        shards = shards_of_reader(self.source.shards, self.source.seed, self.start, reader, readers)
        samples = _samples(shards, self.source.shuffle_buffer, key)
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
    shards: Sequence[Path | Url], seed: int, start: Position, reader: int, readers: int
) -> Iterator[Path | Url]:
    """Yield the shards that one of all readers (workers of ranks) reads, pass after pass, for ever."""
    key = fold(_FOR_STREAM, seed, start.epoch, start.consumed)
    for turn in itertools.count():
        if len(shards) >= readers:
            chosen = epoch_order(len(shards), key, turn)[reader::readers]
        else:
            chosen = epoch_order(len(shards), fold(key, reader), turn)
        yield from (shards[i] for i in chosen.tolist())


def _samples(shards: Iterable[Path | Url], shuffle_buffer: int, key: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield (shard and key, image bytes, label) of shards as they come.

    Raises UserError naming the shard that is truncated or broken or cannot be had, or the sample that lacks
    its image or its label: webdataset would end or go on without a word.
    """
    current: list[Path | Url] = [Path()]

    def members() -> Iterator[dict[str, Any]]:
        for shard in shards:
            current[0] = shard
            name = ""
            with _opened(shard) as file:
                for name, content in read_tar(file, shard):
                    yield {"fname": name, "data": content, "__url__": str(shard)}
            if not name:  # of nothing but such shards one would be read after the other for ever
                raise UserError(f"{shard}: holds no samples (KEY.png or another image, and KEY.cls)")
            yield {}  # the end of a shard ends a sample

    try:
        for sample in webdataset_samples(members(), shuffle_buffer, key):
            yield _parts(sample)
    except ValueError as error:  # webdataset's, of a name that comes twice
        raise UserError(f"{current[0]}: {ascii(str(error.args[0]))[1:-1]}") from None


def _opened(shard: Path | Url) -> io.BufferedReader:
    if isinstance(shard, Url):
        return io.BufferedReader(_Arriving(stream(shard, FIELD)), 1 << 18)
    try:
        return shard.open("rb")
    except OSError as error:
        raise UserError(f"{shard}: cannot read: {error.strerror}") from None


class _Arriving(io.RawIOBase):
    """A file of pieces as they come."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(filter(None, self._pieces), b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _parts(sample: dict[str, Any]) -> tuple[str, bytes, int]:
    where = f"{sample['__url__']}, sample {ascii(sample['__key__'])[1:-1]}"
    images = [sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample]
    if len(images) != 1 or "cls" not in sample:
        raise UserError(
            f"{where}: needs one image and cls, it has {sorted(k for k in sample if k[0] != '_')}"
        )
    if not re.fullmatch(rb"\s*\d{1,20}\s*", sample["cls"]):
        raise UserError(f"{where}: label must be an integer, it is {ascii(sample['cls'][:32])[1:]}")
    return where, images[0], int(sample["cls"])
