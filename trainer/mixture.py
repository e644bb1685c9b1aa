"""Several packed data sets that are read as one.

Samples and labels are numbered through: first those of the first set. Labels are matched by the names of the
classes, or kept apart. Array names end in their dimension: N samples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.index import Index, ShardStore


@dataclass(frozen=True, eq=False)
class Mixture:
    """What ``trainer.data`` needs of an index, over several. ``mix`` makes one."""

    field: str
    parts: tuple[Index, ...]
    labels_N: NDArray[np.int32]
    class_names: tuple[str, ...]
    num_classes: int

    @property
    def store(self) -> ShardStore | None:
        """Where the shards are of the parts that are remote: they share it (``trainer.cache``)."""
        return next((part.store for part in self.parts if part.store is not None), None)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First sample of every part, and the number of samples at the end."""
        return np.cumsum([0, *(part.num_samples for part in self.parts)], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples over all parts."""
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Hash of the parts' fingerprints and of the labels that were given."""
        digest = hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode("ascii"))
        digest.update(self.labels_N.tobytes())
        return digest.hexdigest()

    def locate(self, i: int) -> tuple[str, int]:
        """Return the path of the shard and the byte where the image of sample ``i`` begins."""
        part, own = self._part_of(i)
        shard, offset = part.locate(own)
        return str(part.folder / shard), offset

    def find(self, shard: str, offset: int) -> int | None:
        """Return the sample whose image begins at a byte of a shard, if there is one: locate's inverse."""
        for part, start in zip(self.parts, self.starts[:-1].tolist(), strict=True):
            if (name := shard.removeprefix(f"{part.folder}/")) != shard:
                found = part.find(name, offset)
                return None if found is None else start + found
        return None

    def member_name(self, i: int) -> str:
        """Return the name of image ``i`` in its tar."""
        part, own = self._part_of(i)
        return part.member_name(own)

    def describe(self, i: int) -> str:
        """Return where sample ``i`` is, for messages."""
        part, own = self._part_of(i)
        return part.describe(own)

    def read_many(self, samples: Sequence[int]) -> list[bytes]:
        """Return the bytes of images in the order asked. Raises UserError naming the shard and the sample."""
        part_of = np.searchsorted(self.starts, samples, side="right") - 1
        images = [b""] * len(samples)
        for p in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == p).tolist()
            own = [int(samples[k] - self.starts[p]) for k in places]
            for k, image in zip(places, self.parts[p].read_many(own), strict=True):
                images[k] = image
        return images

    def _part_of(self, i: int) -> tuple[Index, int]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part], int(i - self.starts[part])


def mix(parts: Sequence[Index], labels: Literal["name", "offset"], part_names: Sequence[str]) -> Mixture:
    """Read several data sets as one: classes of one name are one class, or every set has its own.

    New classes come behind those that are there; a set's own begin with its name, and its number if two sets
    have one name. Raises UserError if there are no names to match by.
    """
    if labels == "offset":
        if len(set(part_names)) < len(part_names):  # a/train and b/train
            part_names = [f"{name}-{i}" for i, name in enumerate(part_names, 1)]
        parts_and_names = zip(parts, part_names, strict=True)
        names = tuple(f"{own}/{name}" for part, own in parts_and_names for name in part.class_names)
        starts = np.cumsum([0, *(part.num_classes for part in parts)])
        shifted = [part.labels_N + start for part, start in zip(parts, starts[:-1], strict=True)]
        complete = all(len(part.class_names) == part.num_classes for part in parts)
        return _mixture(parts, shifted, names if complete else (), int(starts[-1]))
    number_of: dict[str, int] = {}
    mapped = []
    for part in parts:
        if len(part.class_names) != part.num_classes:
            raise UserError(
                f"data.mix_labels: the classes of {part.folder} have no names to match by; take offset"
            )
        numbers = [number_of.setdefault(name, len(number_of)) for name in part.class_names]
        mapped.append(np.array(numbers, dtype=np.int32)[part.labels_N])
    return _mixture(parts, mapped, tuple(number_of), len(number_of))


def _mixture(
    parts: Sequence[Index], labels: list[NDArray[np.int32]], names: tuple[str, ...], num_classes: int
) -> Mixture:
    return Mixture(parts[0].field, tuple(parts), np.concatenate(labels).astype(np.int32), names, num_classes)
