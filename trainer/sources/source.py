"""A data set before it is packed: what every source returns, and what can be done to all of them alike."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.order import epoch_order
from trainer.sources.pictures import recode


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set to pack: sample i has class ``classes[i]`` and is read by ``read(i)``."""

    classes: Sequence[str]
    read: Callable[[int], tuple[bytes, str]]
    """Returns the image's bytes and the extension that names their format. Called in forked processes too."""
    skipped: int = 0
    """Files left out because they are not images."""
    files: Sequence[Path] = ()
    """What the images are read from: if one of them changes, an interrupted pack starts again."""
    notes: Callable[[int], dict[str, Any]] | None = None
    """What KEY.json says of a sample; None if there is no KEY.json."""
    variant: str = ""
    """Options that the images depend on: with others, an interrupted pack starts again."""
    pairs: Sequence[tuple[int, int, bool, int]] = ()
    """A verification protocol: (a sample, another one, of one class?, fold), written to pairs.csv."""

    @property
    def class_names(self) -> list[str]:
        """Sorted names, by value if all are numbers; the index of a name is its label."""
        names = set(self.classes)
        by_value = all(name.isascii() and name.isdecimal() for name in names)
        return sorted(names, key=lambda name: (int(name), name)) if by_value else sorted(names)

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[tuple[bytes, str, str]]:
        """Yield (image bytes, extension, class name) in the source's own order."""
        for i, name in enumerate(self.classes):
            yield *self.read(i), name


def labels_of(source: Source) -> NDArray[np.int64]:
    """Return the label of every sample: the index of its class in ``class_names``."""
    label_of = {name: label for label, name in enumerate(source.class_names)}
    if not_text := [name for name in label_of if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise UserError(f"class {not_text[0]!a} has a name that is not UTF-8; rename it")
    return np.array([label_of[name] for name in source.classes], dtype=np.int64)


def shuffled(source: Source, seed: int = 0) -> Iterator[tuple[bytes, str, int]]:
    """Yield (image bytes, extension, label) of all samples in one fixed random order."""
    labels_N = labels_of(source)
    for i in epoch_order(len(source), seed, epoch=0):
        yield *source.read(i), int(labels_N[i])


def with_enough_images(source: Source, minimum: int) -> Source:
    """Leave out classes of fewer than ``minimum`` images. Raises UserError if none is left."""
    count_of = Counter(source.classes)
    chosen = [i for i, name in enumerate(source.classes) if count_of[name] >= minimum]
    if not chosen:
        most = max(count_of.values(), default=0)
        raise UserError(f"--min-per-class {minimum}: the largest class has {most} images")
    return source if len(chosen) == len(source) else _chosen(source, chosen)


def split_by_class(source: Source, fraction: float, seed: int) -> dict[str, Source]:
    """Cut into "train" and "test" of different classes; ``fraction`` of the classes go to the test."""
    names = source.class_names
    num_test = round(fraction * len(names))
    if not 0 < num_test < len(names):
        raise UserError(f"--split class {fraction}: {num_test} of {len(names)} classes would be for the test")
    tested = {names[i] for i in epoch_order(len(names), seed, epoch=0)[:num_test]}
    return _halves(source, [name in tested for name in source.classes])


def split_by_sample(source: Source, fraction: float, seed: int) -> dict[str, Source]:
    """Cut every class into "train" and "test"; ``fraction`` of its images, rounded, go to the test."""
    labels_N = labels_of(source)
    tested_N = np.zeros(len(source), dtype=bool)
    by_label = np.split(np.argsort(labels_N, kind="stable"), np.cumsum(np.bincount(labels_N))[:-1])
    for label, of_class in enumerate(by_label):
        order = epoch_order(len(of_class), seed, epoch=label)
        tested_N[of_class[order[: round(fraction * len(of_class))]]] = True
    if tested_N.all() or not tested_N.any():
        raise UserError(
            f"--split sample {fraction}: {tested_N.sum()} of {len(source)} images are for the test"
        )
    return _halves(source, tested_N.tolist())


def reencoded(source: Source, shorter_side: int | None, jpeg_quality: int | None) -> Source:
    """Return a source whose images are scaled down and encoded again as they are read (see ``recode``)."""

    def read(i: int) -> tuple[bytes, str]:
        content, extension = source.read(i)
        try:
            return recode(content, extension, shorter_side, jpeg_quality)
        except ValueError as error:
            raise UserError(f"sample {i} of class {source.classes[i]}: {error}") from None

    variant = f"{source.variant} --resize {shorter_side} --quality {jpeg_quality}"
    return dataclasses.replace(source, read=read, variant=variant)


def _halves(source: Source, is_test: Sequence[bool]) -> dict[str, Source]:
    if source.pairs:
        raise UserError("--split: this set has a protocol of pairs, which cannot be cut")
    return {
        name: _chosen(source, [i for i, test in enumerate(is_test) if test == wanted])
        for name, wanted in (("train", False), ("test", True))
    }


def _chosen(source: Source, chosen: Sequence[int]) -> Source:
    if source.pairs:
        raise UserError("--min-per-class: this set has a protocol of pairs, of which none can be left out")
    notes = source.notes
    return dataclasses.replace(
        source,
        classes=[source.classes[i] for i in chosen],
        read=lambda i: source.read(chosen[i]),
        notes=notes and (lambda i: notes(chosen[i])),
    )
