"""Sets of people with a protocol of their own: LFW (pairs), Market-1501 (cameras), PIPA (head boxes)."""

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from trainer.errors import UserError
from trainer.regions import Box, region_box, within_photo
from trainer.sources.files import extension_of, open_files, read_text
from trainer.sources.folder import image_folder, read_from
from trainer.sources.pictures import JPEG_QUALITY, is_image, jpeg_bytes
from trainer.sources.source import Source

MARKET_SETS: dict[Literal["train", "gallery", "query"], str] = {
    "train": "bounding_box_train",
    "gallery": "bounding_box_test",
    "query": "query",
}
PIPA_SETS = {"leftover": 0, "train": 1, "val": 2, "test": 3}
"""Codes as counted in the annotation files; the README that comes with them has others."""


def lfw(path: Path, pairs_file: Path) -> Source:
    """Return a folder or zip of NAME/NAME_0001.jpg with the pairs of LFW's pairs.txt.

    The file begins with "FOLDS PAIRS" (or PAIRS, one fold) and has, per fold, so many lines "NAME i j" and so
    many "NAME i NAME j". Raises UserError naming the line.
    """
    source = image_folder(path)
    files, number_of = _image_names(path), dict[str, int]()
    for i, file in enumerate(files):
        if (first := number_of.setdefault(_stem(file), i)) != i:
            raise UserError(f"{path}: {files[first]!a} and {file!a} have the same name")
    assert len(number_of) == len(source), "images and names are listed in one order"
    lines = [line.split() for line in read_text(pairs_file).splitlines() if line.strip()]
    try:
        sizes = [int(word) for word in lines[0]]
        folds, per_kind = sizes if len(sizes) == 2 else (1, *sizes)
    except (IndexError, ValueError):
        raise UserError(f"{pairs_file}:1: it must begin with FOLDS<tab>PAIRS") from None
    if folds < 1 or per_kind < 1 or len(lines) != 1 + 2 * folds * per_kind:
        raise UserError(f"{pairs_file}: {len(lines) - 1} pairs are not {folds} folds of 2 x {per_kind}")
    pairs = []
    for n, words in enumerate(lines[1:]):
        same = n // per_kind % 2 == 0
        where = f"{pairs_file}: pair {n + 1}"
        if len(words) != (3 if same else 4) or not (words[1] + words[-1]).isdecimal():
            raise UserError(f"{where}: {' '.join(words)!a} is not NAME i {'' if same else 'NAME '}j")
        names = [f"{words[0]}_{int(words[1]):04d}", f"{words[0 if same else 2]}_{int(words[-1]):04d}"]
        if missing := [name for name in names if name not in number_of]:
            raise UserError(f"{where}: {path} has no image {missing[0]}")
        pairs.append((number_of[names[0]], number_of[names[1]], same, n // (2 * per_kind)))
    return dataclasses.replace(source, pairs=pairs)


def market1501(path: Path, split: Literal["train", "gallery", "query"]) -> Source:
    """Return one part of Market-1501, from a folder or zip of its three folders of PERSON_cCAMERAsN_... .jpg.

    A class is a person as the file name has it; KEY.json says {"person": number, "camera": number}. Junk (-1)
    and distractors (0) of the gallery are kept: the protocol needs to know them.
    """
    files = open_files(path)
    below = next((n for n in files.names if f"/{MARKET_SETS[split]}/" in f"/{n}"), "")
    below = below[: below.rfind(f"{MARKET_SETS[split]}/")] + f"{MARKET_SETS[split]}/"
    inside = [name for name in files.names if name.startswith(below)]
    images = [name for name in inside if is_image(extension_of(name))]
    if not images:
        raise UserError(f"{path} is not Market-1501: no images in {MARKET_SETS[split]}")
    notes: list[dict[str, Any]] = []
    classes = []
    for name in images:
        match = re.fullmatch(r"(-1|\d{1,6})_c(\d{1,3})s?.*", name.removeprefix(below))
        if match is None:
            raise UserError(f"{path}: {name!a} is not PERSON_cCAMERA...")
        classes.append(match[1])
        notes.append({"person": int(match[1]), "camera": int(match[2])})
    source = read_from(files, images, classes, skipped=len(inside) - len(images))
    return dataclasses.replace(source, notes=notes.__getitem__)


class _Head(NamedTuple):
    """One line of PIPA's lists."""

    photoset: str
    photo: str
    box: tuple[int, int, int, int]
    identity: str
    subset: int


def pipa(path: Path, split: str, region: str = "head") -> Source:
    """Return the people of one of ``PIPA_SETS``, cut out of the photos: FOLDER/**/PHOTOSET_PHOTO.jpg.

    Needs all_data.txt in the folder: lines of photoset, photo, x, y, width, height, identity, subset.
    KEY.json says where a person was found, and, for every split_SET_NAME.txt beside it, "NAME": 0 (gallery)
    or 1 (query). ``region`` is one of ``trainer/regions.py``.
    """
    heads = [h for h in map(_head, _lines(path / "all_data.txt", 8)) if h.subset == PIPA_SETS[split]]
    files = open_files(path)
    file_of = {_stem(name): name for name in files.names if is_image(extension_of(name))}
    halves = {
        file.stem.rpartition("_")[2]: {_head(words)[:4]: int(words[8]) for words in _lines(file, 9)}
        for file in sorted(path.glob(f"split_{split}_*.txt"))
    }
    if not heads:
        raise UserError(f"{path / 'all_data.txt'}: no line of subset {PIPA_SETS[split]} ({split})")
    for head in heads:
        if f"{head.photoset}_{head.photo}" not in file_of:
            raise UserError(f"{path}: no photo {head.photoset}_{head.photo}.jpg, which all_data.txt names")

    def read(i: int) -> tuple[bytes, str]:
        name = file_of[f"{heads[i].photoset}_{heads[i].photo}"]
        return _cut(files.read(name), region_box(heads[i].box, region), str(path / name)), "jpg"

    def notes(i: int) -> dict[str, Any]:
        head = heads[i]
        found = {"photoset": head.photoset, "photo": head.photo, "head": list(head.box)}
        return found | {name: half[head[:4]] for name, half in halves.items() if head[:4] in half}

    used = sorted({file_of[f"{head.photoset}_{head.photo}"] for head in heads})
    origins = [path / "all_data.txt", *sorted(path.glob("split_*.txt")), *(path / name for name in used)]
    return Source([head.identity for head in heads], read, files=origins, notes=notes, variant=region)


def _lines(path: Path, columns: int) -> Sequence[list[str]]:
    rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    for number, words in enumerate(rows):
        numbers = words[2:6] + words[7:columns]
        if len(words) < columns or not all(re.fullmatch(r"-?\d{1,9}", word) for word in numbers):
            raise UserError(
                f"{path}: row {number + 1}: {columns} columns are expected: {' '.join(words)[:80]!a}"
            )
    return rows


def _head(words: Sequence[str]) -> _Head:
    x, y, width, height = map(int, words[2:6])
    return _Head(words[0], words[1], (x, y, width, height), words[6], int(words[7]))


def _cut(photo: bytes, box: Box, where: str) -> bytes:
    try:
        with Image.open(io.BytesIO(photo)) as image:
            part = image.convert("RGB").crop(within_photo(box, *image.size))
            return jpeg_bytes(part, JPEG_QUALITY)
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise UserError(f"{where}: cannot cut out: {' '.join(str(error).split())}") from None


def _image_names(path: Path) -> list[str]:
    return [name for name in open_files(path).names if is_image(extension_of(name))]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]
