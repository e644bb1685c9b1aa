"""InsightFace's two files: training sets (.rec with its .idx) and verification sets (.bin)."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.pickles import read_pickle
from trainer.recordio import RecordFile, whole_number
from trainer.sources.pictures import sniffed
from trainer.sources.source import Source

FOLDS = 10  # of LFW's protocol, which all .bin files follow
UNKNOWN = "unknown"


def rec(path: Path) -> Source:
    """Return the images of a .rec file, or of the train.rec in a folder; a class is an identity's number.

    Raises UserError for a label that a float32 cannot hold exactly: at 2^24 and above.
    """
    file = RecordFile(path / "train.rec" if path.is_dir() else path)
    images = _image_lines(file)
    names: dict[int, str] = {}
    classes = []
    for i in images:
        identity = whole_number(next(iter(file.labels(i)), math.nan), file.describe(i))
        classes.append(names.setdefault(identity, str(identity)))

    def read(i: int) -> tuple[bytes, str]:
        return sniffed(file.read(images[i]).image, file.describe(images[i]))

    return Source(classes, read, files=[file.path, file.path.with_suffix(".idx")])


def verification_bin(path: Path) -> Source:
    """Return the images of a .bin file with its pairs, in ten folds; nobody knows who they show.

    Images that occur in several pairs are packed once.
    """
    images, same = _checked_bin(path, read_pickle(path))
    numbers: dict[bytes, int] = {}
    places = [numbers.setdefault(image, len(numbers)) for image in images]
    kept = list(numbers)
    folds = fold_of(len(same))
    return Source(
        classes=[UNKNOWN] * len(kept),
        read=lambda i: sniffed(kept[i], f"{path}: image {i}"),
        files=[path],
        pairs=[(places[2 * p], places[2 * p + 1], bool(s), folds[p]) for p, s in enumerate(same)],
    )


def fold_of(num_pairs: int) -> list[int]:
    """Return the fold of every pair: ten runs, the first ones longer by one if need be (KFold unshuffled)."""
    short, longer = divmod(num_pairs, FOLDS)
    return [fold for fold in range(FOLDS) for _ in range(short + (fold < longer))]


def _image_lines(file: RecordFile) -> range:
    """Return which records are images: all, unless record 0 says where the identities begin."""
    if not len(file.keys_N):
        raise UserError(f"{file.path.with_suffix('.idx')} holds no lines")
    first = file.read(0)
    if first.image:
        return range(len(file.keys_N))
    if file.keys_N[0] != 0 or not first.labels:
        raise UserError(f"{file.describe(0)}: a record without an image, and not that of a data set's ranges")
    return range(1, _end_of_images(first.labels[0], file))


def _end_of_images(label: float, file: RecordFile) -> int:
    """Return where the images end: at the key that record 0 names. Raises UserError if keys are missing."""
    end = int(label) if 1 < label <= len(file.keys_N) else 0
    if not end or (file.keys_N[:end] != range(end)).any():
        raise UserError(
            f"{file.describe(0)}: the images end before key {label:.9g},"
            f" but the .idx has {len(file.keys_N)} lines, or not all of the keys before"
        )
    return end


def _checked_bin(path: Path, content: Any) -> tuple[list[bytes], list[bool]]:
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path}: a list of images and a list of same-or-not are expected")
    images, same = (part.tolist() if isinstance(part, np.ndarray) else part for part in content)
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple):
        raise UserError(f"{path}: a list of images and a list of same-or-not are expected")
    if wrong := [value for value in same if not isinstance(value, int) or value not in (0, 1)]:
        raise UserError(f"{path}: {ascii(wrong[0])[:50]} stands where a pair is the same, or not")
    images = [image if isinstance(image, bytes) else _from_array(image, path) for image in images]
    if not same or len(images) != 2 * len(same):
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs")
    return images, [bool(value) for value in same]


def _from_array(image: Any, path: Path) -> bytes:
    """Some tools keep the bytes of a JPEG in an array of uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise UserError(f"{path}: an image is a {type(image).__name__}, not the bytes of a JPEG")
    return image.tobytes()
