"""The index of a packed data set: any sample is found with one read.

::

    DATA/*.tar               data shards, written by ``trainer.shards`` or by another tool
    DATA/index/index.json    version, fingerprint, shards with size and sha256, class names, statistics
    DATA/index/*.npy         offset, length, label of every sample: 16 bytes, memory-mapped by all workers

Streaming tars makes epochs inexact, cannot resume and hangs when shards are uneven; a random order over an
index has none of that. An index is complete if its index.json is there: it goes first and comes last.
Array names end in their dimension: N samples.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.order import Order

VERSION = 1
ARRAYS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype("<i8"),
    "length": np.dtype("<i4"),
    "label": np.dtype("<i4"),
}
MAX_NOTE = 1 << 20  # bytes of a KEY.json
MAX_MEMBERS = 64  # between two images; tarfile follows a negative size backwards for ever
MAX_OPEN_FILES = 128  # per process; a login shell's limit is 1024
# A network file system says so of a server that restarts, or of a file that was moved under an open one.
PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
RETRY_SECONDS = (0.1, 1.0, 5.0)
MAX_IMAGE_BYTES = 1 << 26  # what an index says is believed before anything is read
_MAX_COUNT = 1 << 48


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar as the index knows it."""

    name: str
    n: int
    bytes: int
    sha256: str


class ShardStore(Protocol):
    """Where the shards of an index are kept that are not in its folder (``trainer.cache``)."""

    def open(self, shard: Shard) -> int:
        """Return a descriptor to read from. Raises UserError if the shard cannot be had."""

    def expect(self, epoch: int, position: int, order: Order) -> None:
        """Tell which sample is read now: number ``position`` of an epoch of ``order``."""

    def fetch_ahead(self) -> None:
        """Begin to fetch what is read next, beside the reader; for one process of a rank."""


def _open_file(path: str | Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _OpenFiles:
    """Shards, opened when first read, the least recently used closed first. Fork-safe: pread seeks not."""

    def __init__(self, open_file: Callable[[str], int] = _open_file) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._open_file = open_file

    def pread(self, path: str, length: int, offset: int) -> bytes:
        """Read again, from a file opened anew, after an error of the storage that may pass."""
        for patience in RETRY_SECONDS:
            try:
                return os.pread(self._descriptor(path), length, offset)
            except OSError as error:
                if error.errno not in PASSING_ERRORS:
                    raise
                if path in self._descriptors:
                    os.close(self._descriptors.pop(path))
                time.sleep(patience)
        return os.pread(self._descriptor(path), length, offset)

    def _descriptor(self, path: str) -> int:
        if path not in self._descriptors:
            self._close_removed()
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = self._open_file(path)
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def _close_removed(self) -> None:
        """Let go of files that a cache has removed: they take room on the disk until then."""
        for path, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(path))

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """A packed data set: what is in it and where. ``open_index`` makes one; pickling it re-opens it."""

    field: str
    """Name of the configuration field (or the option) that asked for it; begins every message."""
    folder: Path
    shards: tuple[Shard, ...]
    starts: NDArray[np.int64]
    """First sample of every shard, and the number of samples at the end."""
    offsets_N: NDArray[np.int64]
    lengths_N: NDArray[np.int32]
    labels_N: NDArray[np.int32]
    num_classes: int
    class_names: tuple[str, ...]
    """Name of every label; empty for foreign shards, whose classes are numbers only."""
    class_statistics: dict[str, float]
    """Images per class: ``min``, ``mean``, ``max``; ``empty`` counts classes without any."""
    fingerprint: str
    duplicates: dict[str, int] = dataclasses.field(default_factory=dict)
    """``images`` that are copies of another, those of them ``of_other_classes``; empty if never counted."""
    store: ShardStore | None = None
    """Where the shards are; None: in the folder."""
    _files: _OpenFiles = dataclasses.field(default_factory=_OpenFiles, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.store is not None:
            return _open_stored, (self.folder, self.field, self.store)
        return open_index, (self.folder, self.field)

    def stored_in(self, store: ShardStore) -> "Index":
        """Return this index for shards that are elsewhere."""
        shards = {shard.name: shard for shard in self.shards}
        files = _OpenFiles(lambda path: store.open(shards[Path(path).name]))
        return dataclasses.replace(self, store=store, _files=files)

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return int(self.starts[-1])

    def locate(self, i: int) -> tuple[str, int]:
        """Return the shard's name and the byte where the image of sample ``i`` begins."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.shards[shard].name, int(self.offsets_N[i])

    def find(self, shard: str, offset: int) -> int | None:
        """Return the sample whose image begins at a byte of a shard, if there is one: locate's inverse."""
        for first, end, known in zip(self.starts[:-1], self.starts[1:], self.shards, strict=True):
            if known.name == shard:
                found = first + np.flatnonzero(self.offsets_N[first:end] == offset)
                return int(found[0]) if len(found) else None
        return None

    def member_name(self, i: int) -> str:
        """Return the name of image ``i`` in its tar, or where it is if its header cannot be read."""
        shard, offset = self.locate(i)
        try:
            header = self._files.pread(
                str(self.folder / shard), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE
            )
            return ascii(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[1:-1]
        except (OSError, tarfile.TarError):
            return f"at byte {offset}"

    def read(self, i: int) -> bytes:
        """Return the bytes of image ``i``. Raises UserError naming the shard and the sample."""
        return self.read_many([i])[0]

    def read_many(self, samples: Sequence[int]) -> list[bytes]:
        """Return the bytes of images in the order asked, read in the order in which they lie.

        Storage errors that may pass are tried again. Raises UserError naming the shard and the sample.
        """
        samples_N = np.asarray(samples, dtype=np.int64)
        shards_N = np.searchsorted(self.starts, samples_N, side="right") - 1
        offsets_N = np.asarray(self.offsets_N)[samples_N]
        lengths, shards, offsets = self.lengths_N[samples_N].tolist(), shards_N.tolist(), offsets_N.tolist()
        images = [b""] * len(samples_N)
        for k in np.lexsort((offsets_N, shards_N)).tolist():
            try:
                images[k] = self._files.pread(self._paths[shards[k]], lengths[k], offsets[k])
            except OSError as error:
                raise UserError(f"{self.describe(samples[k])}: cannot read: {error.strerror}") from None
            if len(images[k]) != lengths[k]:
                raise UserError(
                    f"{self.describe(samples[k])}: cannot read: "
                    f"{len(images[k])} of {lengths[k]} bytes are there"
                )
        return images

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        return tuple(str(self.folder / shard.name) for shard in self.shards)

    def describe(self, i: int) -> str:
        """Return where sample ``i`` is, for messages: field, shard and the member's name (or its offset)."""
        return f"{self.field}: shard {self.locate(i)[0]}, sample {self.member_name(i)}"

    def read_note(self, i: int) -> dict[str, Any]:
        """Return what KEY.json says of sample ``i``, {} without one. Raises UserError naming the sample.

        The headers around the image are searched: from the end of the image before to the next key.
        """
        shard, offset = self.locate(i)
        is_first = i in self.starts
        before = 0 if is_first else int(self.offsets_N[i - 1]) + int(self.lengths_N[i - 1])
        notes: dict[str, tarfile.TarInfo] = {}
        key = None
        try:
            with (self.folder / shard).open("rb") as file:
                file.seek(-(-before // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in islice(tar, MAX_MEMBERS):
                        name, _, extension = member.name.rpartition(".")
                        if key not in (None, name):
                            break
                        if member.offset_data == offset:
                            key = name
                        if extension.lower() == "json" and 0 <= member.size <= MAX_NOTE:
                            notes[name] = member
                if key not in notes:
                    return {}
                file.seek(notes[key].offset_data)
                note = json.loads(file.read(notes[key].size))
        except (OSError, tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.describe(i)}: cannot read its json: {error}") from None
        return note if isinstance(note, dict) else {"json": note}


def open_index(folder: Path, field: str) -> Index:
    """Open a packed data set; ``field`` begins every message. Checks the shards' sizes, not their contents.

    Raises UserError if the folder, its index or a shard is missing, of another size or of another version.
    """
    index = load_index(folder, field)
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"{field}: shard {path} is missing")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"{field}: shard {path} has {size} bytes, its index says {shard.bytes}")
    return index


def load_index(folder: Path, field: str, source: object = None) -> Index:
    """Open a data set as ``open_index`` does, without a look at its shards.

    ``source`` is where the index was fetched from, for messages.
    """
    if not folder.is_dir():
        raise UserError(f"{field}: {folder} does not exist" + (" as a folder" if folder.exists() else ""))
    if not is_packed(folder):
        raise UserError(f"{field}: {folder} has no index; run python launch/pack.py index {folder}")
    with _broken_index_told(folder, field, source):
        return _load(folder, field)


def read_head(folder: Path, field: str, source: object) -> dict[str, Any]:
    """Return what the index.json says that was fetched from ``source``, checked. Raises UserError."""
    with _broken_index_told(folder, field, source):
        return _read_head(folder)


@contextmanager
def _broken_index_told(folder: Path, field: str, source: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # json and numpy raise nearly anything on broken bytes
        reason = " ".join(ascii(str(error) or type(error).__name__)[1:-1].split())
        todo = f"delete {folder}/index and make it again" if source is None else "make it again"
        raise UserError(f"{field}: the index of {source or folder} is broken ({reason}); {todo}") from None


def is_packed(folder: Path) -> bool:
    """Say whether the folder holds a complete data set."""
    return index_path(folder).is_file()


def write_index(folder: Path, head: dict[str, Any], columns: dict[str, NDArray[Any]]) -> None:
    """Write or replace an index: what index.json says, and one array for every name of ``ARRAYS``."""
    (folder / "index").mkdir(exist_ok=True)
    index_path(folder).unlink(missing_ok=True)
    arrays = {}
    for name, column_N in columns.items():
        with _replacement(array_path(folder, name)) as file:
            np.save(file, column_N, allow_pickle=False)
        with array_path(folder, name).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            arrays[name] = {"bytes": written.tell(), "sha256": digest}
    with _replacement(index_path(folder)) as file:
        head = {"version": VERSION, **head, "arrays": arrays}
        file.write((json.dumps(head, indent=1) + "\n").encode("ascii"))
    _sync_folder(folder / "index")


def move_index(source: Path, target: Path) -> None:
    """Move an index to the folder of its shards, in place of the one that is there."""
    (target / "index").mkdir(exist_ok=True)
    index_path(target).unlink(missing_ok=True)
    for name in ARRAYS:
        array_path(source, name).replace(array_path(target, name))
    _sync_folder(target)
    index_path(source).replace(index_path(target))
    _sync_folder(target / "index")


def index_path(folder: Path) -> Path:
    """Return where a data set's index.json is."""
    return folder / "index" / "index.json"


def array_path(folder: Path, name: str) -> Path:
    """Return where an array of the index is."""
    return folder / "index" / f"{name}.npy"


def _read_head(folder: Path) -> dict[str, Any]:
    head = json.loads(index_path(folder).read_text(encoding="utf-8"))
    if head["version"] != VERSION:
        raise ValueError(f"it has version {head['version']}, this code reads {VERSION}")
    names = [shard["name"] for shard in head["shards"]]
    for shard in head["shards"]:
        if not _is_file_name(shard["name"]):
            raise ValueError(f"{shard['name']!r} is not the name of a file beside the index")
        if not (_is_count(shard["n"]) and _is_count(shard["bytes"]) and _is_sha256(shard["sha256"])):
            raise ValueError(f"n, bytes or sha256 of {shard['name']} is not one")
    if len(set(names)) < len(names):
        raise ValueError("two shards have the same name")
    if not sum(shard["n"] for shard in head["shards"]):
        raise ValueError("it has no samples")
    for name, array in head.get("arrays", {}).items():
        if not (name in ARRAYS and _is_count(array["bytes"]) and _is_sha256(array["sha256"])):
            raise ValueError(f"array {name!r} is not known, or its bytes or sha256 is not one")
    class_names = head["class_names"]
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError("class_names are not all text")
    "".join(class_names).encode()  # half a character is none that can be shown
    if not _is_count(head["num_classes"]) or len(class_names) not in (0, head["num_classes"]):
        raise ValueError(f"num_classes is {head['num_classes']!r}, there are {len(class_names)} names")
    if not _is_sha256(head["fingerprint"]):
        raise ValueError("fingerprint is not one")
    return head


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and bool(re.fullmatch(r"[^/\\.-][^/\\]{,254}", name))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _load(folder: Path, field: str) -> Index:
    head = _read_head(folder)
    shards = tuple(Shard(**shard) for shard in head["shards"])
    starts = np.cumsum([0, *(shard.n for shard in shards)], dtype=np.int64)
    offsets_N, lengths_N, labels_N = (_open_array(folder, name, int(starts[-1])) for name in ARRAYS)
    if labels_N.min() < 0 or labels_N.max() >= head["num_classes"]:
        raise ValueError(f"label.npy has labels outside 0..{head['num_classes'] - 1}")
    if lengths_N.min() < 1 or lengths_N.max() > MAX_IMAGE_BYTES:
        raise ValueError(f"length.npy has images outside 1..{MAX_IMAGE_BYTES} bytes")
    for shard, first, end in zip(shards, starts, starts[1:], strict=False):
        inside_N = offsets_N[first:end] <= shard.bytes - lengths_N[first:end]
        if not (inside_N.all() and (offsets_N[first:end] >= tarfile.BLOCKSIZE).all()):
            raise ValueError(f"offset.npy has images outside of {shard.name}")
    return Index(
        field=field,
        folder=folder,
        shards=shards,
        starts=starts,
        offsets_N=offsets_N,
        lengths_N=lengths_N,
        labels_N=labels_N,
        num_classes=head["num_classes"],
        class_names=tuple(head["class_names"]),
        class_statistics=head["class_statistics"],
        fingerprint=head["fingerprint"],
        duplicates=head.get("duplicates", {}),
    )


def _open_stored(folder: Path, field: str, store: ShardStore) -> Index:
    return load_index(folder, field).stored_in(store)


def _open_array(folder: Path, name: str, num_samples: int) -> NDArray[Any]:
    # Unlike np.load it knows no other format, and says ValueError even of an empty file.
    array_N = np.lib.format.open_memmap(array_path(folder, name), mode="r")
    if array_N.shape != (num_samples,) or array_N.dtype != ARRAYS[name]:
        raise ValueError(f"{name}.npy is {array_N.dtype}{list(array_N.shape)}")
    return array_N


@contextmanager
def _replacement(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of ``path`` once it is complete and on disk."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
