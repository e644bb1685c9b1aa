"""Images to be judged, wherever they are: a packed data set, a folder of images, or the crops of an album.

Besides pixels and labels a protocol may need to know who is who: the *key* that names an image in a list of
pairs, and *notes* such as person, camera or template. They come from, in this order,

    a CSV file with a column ``key`` (or ``path``), named by the user
    DATA/index/notes.csv                the same, written beside the index
    KEY.json in the data shards         one object for each image

Keys are those of the tars (``000000012`` of ``000000012.jpg``), or paths below the folder
(``Ann/Ann_0001.jpg``), which are found without their extension too.
"""

import csv
import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.folders import walk
from trainer.index import Index, is_packed, open_index

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_Members = dict[int, tuple[str, int, int]]


@dataclass(frozen=True)
class ImageSet:
    """N images in a fixed order."""

    field: str
    """Option that named it; begins every message."""
    labels_N: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]
    """Returns the encoded image. Raises UserError."""
    describe: Callable[[int], str]
    list_keys: Callable[[], Sequence[str]]
    list_notes: Callable[[], Sequence[dict[str, Any]]]
    fingerprint: Callable[[], str] = lambda: ""
    """Returns what tells a set from others; of a folder, a hash of names and sizes. Raises UserError."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @cached_property
    def keys(self) -> Sequence[str]:
        """The name of every image."""
        return self.list_keys()

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Where the image of a key is; keys are known with and without their extension."""
        bare = {os.path.splitext(key)[0]: i for i, key in enumerate(self.keys)}
        return bare | {key: i for i, key in enumerate(self.keys)}

    def only(self, rows: Sequence[int]) -> "ImageSet":
        """Return some of the images, in the order of ``rows``."""
        return dataclasses.replace(
            self,
            labels_N=self.labels_N[list(rows)],
            read=lambda i: self.read(rows[i]),
            describe=lambda i: self.describe(rows[i]),
            list_keys=lambda: [self.keys[i] for i in rows],
            list_notes=lambda: [self.list_notes()[i] for i in rows],
        )

    def note(self, name: str, path: Path | None = None) -> NDArray[np.str_] | None:
        """Return a note of every image as text, from the CSV ``path`` if given; None if there is none at all.

        Raises UserError for an image that lacks it while others have it.
        """
        rows = _read_notes(path, self) if path is not None else self.list_notes()
        values = [row.get(name) for row in rows]
        if all(value is None for value in values):
            return None
        if None in values:
            raise UserError(f"{self.field}: image {self.keys[values.index(None)]} has no {name}, others have")
        return np.array([str(value) for value in values])

    def required_note(self, name: str, path: Path | None = None) -> NDArray[np.str_]:
        """Return a note that the protocol cannot do without. Raises UserError."""
        values = self.note(name, path)
        if values is None:
            raise UserError(
                f"{self.field}: no image says its {name}: neither KEY.json nor a CSV has the column"
            )
        return values


def open_images(path: Path, field: str) -> ImageSet:
    """Open a packed data set, or a folder of images. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{field}: {path} is not a folder")
    return _packed(open_index(path, field)) if is_packed(path) else _folder(path, field)


def _packed(index: Index) -> ImageSet:
    def members() -> list[tuple[str, int, int]]:
        scanned = {shard.name: _scan(index.folder / shard.name) for shard in index.shards}
        return [_member(index, scanned, i) for i in range(index.num_samples)]

    def notes() -> list[dict[str, Any]]:
        side = index.folder / "index" / "notes.csv"
        if side.is_file():
            return list(_read_notes(side, images))
        return [_read_json(index, member, i) for i, member in enumerate(members())]

    images = ImageSet(
        field=index.field,
        labels_N=index.labels_N.astype(np.int64),
        class_names=index.class_names,
        read=index.read,
        describe=index.describe,
        list_keys=lambda: [key for key, *_ in members()],
        list_notes=notes,
        fingerprint=lambda: index.fingerprint,
    )
    return images


def _folder(root: Path, field: str) -> ImageSet:
    found = (folder / name for folder, _, names in walk(root) for name in names)
    paths = sorted(path for path in found if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"{field}: {root} holds neither an index nor images ({', '.join(EXTENSIONS)})")
    classes = [path.relative_to(root).parent.as_posix() for path in paths]
    names = sorted(set(classes))
    label_of = {name: label for label, name in enumerate(names)}

    def read(i: int) -> bytes:
        try:
            return paths[i].read_bytes()
        except OSError as error:
            raise UserError(f"{field}: {paths[i]}: cannot read: {error.strerror}") from None

    keys = [path.relative_to(root).as_posix() for path in paths]

    def fingerprint() -> str:
        try:
            sizes = [path.stat().st_size for path in paths]
        except OSError as error:
            raise UserError(f"{field}: {error.filename}: cannot read: {error.strerror}") from None
        return hashlib.sha256(json.dumps([keys, sizes]).encode()).hexdigest()

    return ImageSet(
        field=field,
        labels_N=np.array([label_of[name] for name in classes]),
        class_names=tuple(names),
        read=read,
        describe=lambda i: f"{field}: {paths[i]}",
        list_keys=lambda: keys,
        list_notes=lambda: [{} for _ in paths],
        fingerprint=fingerprint,
    )


def _scan(path: Path) -> _Members:
    """Return the byte of each image of a tar -> its key, and offset and length of KEY.json (0 if none)."""
    images: dict[int, str] = {}
    texts: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")  # as webdataset splits
                key = folder + slash + stem
                if extension.lower() == "json":
                    texts[key] = (member.offset_data, member.size)
                elif f".{extension.lower()}" in EXTENSIONS:
                    images[member.offset_data] = key
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot read: {error}") from None
    return {offset: (key, *texts.get(key, (0, 0))) for offset, key in images.items()}


def _member(index: Index, scanned: dict[str, _Members], i: int) -> tuple[str, int, int]:
    shard, offset = index.locate(i)
    if offset not in scanned[shard]:
        raise UserError(f"{index.describe(i)}: the tar has no image there; index the shards again")
    return scanned[shard][offset]


def _read_json(index: Index, member: tuple[str, int, int], i: int) -> dict[str, Any]:
    key, offset, length = member
    if not length:
        return {}
    with (index.folder / index.locate(i)[0]).open("rb") as file:
        text = os.pread(file.fileno(), length, offset)
    try:
        note = json.loads(text)
    except ValueError:
        raise UserError(f"{index.describe(i)}: {key}.json is not JSON") from None
    if not isinstance(note, dict):
        raise UserError(f"{index.describe(i)}: {key}.json holds no object")
    return note


def _read_notes(path: Path, images: ImageSet) -> Sequence[dict[str, Any]]:
    """Return the row of every image in a CSV. Raises UserError for one that is of no image."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read notes: {error}") from None
    reader = csv.DictReader(lines)
    column = next((name for name in ("key", "path") if name in (reader.fieldnames or ())), None)
    if column is None:
        raise UserError(f"{path}: its header {','.join(reader.fieldnames or ())!r} has no key or path")
    rows: list[dict[str, Any]] = [{} for _ in range(len(images))]
    try:
        for row in reader:
            position = images.position_of.get(str(row[column]))
            if position is None:
                raise UserError(f"{path}:{reader.line_num}: {images.field} has no image {row[column]}")
            rows[position] = row
    except csv.Error as error:
        raise UserError(f"{path}: cannot read notes: {error}") from None
    return rows
