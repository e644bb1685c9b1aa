"""Data shards: plain webdataset tars, and a side-car index that finds any sample with one read.

::

    OUT/data-000000.tar ...    KEY.png KEY.cls KEY.png KEY.cls ... (any webdataset reader can read them)
    OUT/index/index.json       version, fingerprint, shards with size and sha256, class names, statistics
    OUT/index/*.npy            offset, length, label of every sample: 16 bytes, memory-mapped by all workers

Streaming tars makes epochs inexact, cannot resume and hangs when shards are uneven; a random order over an
index has none of that. Members are never extracted to disk, so their names do not matter. The only module
that imports webdataset. Array names end in their dimension: N samples.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

VERSION = 1
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
ARRAYS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype("<i8"),
    "length": np.dtype("<i4"),
    "label": np.dtype("<i4"),
}
MAX_LABEL = MAX_LENGTH = 2**31 - 1
MAX_OPEN_FILES = 128  # per process; a login shell's limit is 1024

_BLOCK = tarfile.BLOCKSIZE
# As webdataset splits: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One tar as the index knows it."""

    name: str
    n: int
    bytes: int
    sha256: str


class _OpenFiles:
    """Shards, opened when first read, the least recently used closed first. Fork-safe: pread seeks not."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def pread(self, path: Path, length: int, offset: int) -> bytes:
        if path not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(path)
        return os.pread(self._descriptors[path], length, offset)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclass(frozen=True, eq=False)
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
    _files: _OpenFiles = dataclasses.field(default_factory=_OpenFiles, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder, self.field)

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return int(self.starts[-1])

    def locate(self, i: int) -> tuple[str, int]:
        """Return the shard's name and the byte where the image of sample ``i`` begins."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.shards[shard].name, int(self.offsets_N[i])

    def read(self, i: int) -> bytes:
        """Return the bytes of image ``i``. Raises UserError naming the shard and the sample."""
        shard, offset = self.locate(i)
        length = int(self.lengths_N[i])
        try:
            image = self._files.pread(self.folder / shard, length, offset)
        except OSError as error:
            raise UserError(f"{self.describe(i)}: cannot read: {error.strerror}") from None
        if len(image) != length:
            raise UserError(f"{self.describe(i)}: cannot read: {len(image)} of {length} bytes are there")
        return image

    def describe(self, i: int) -> str:
        """Return where sample ``i`` is, for messages: field, shard and the member's name (or its offset)."""
        shard, offset = self.locate(i)
        try:
            header = self._files.pread(self.folder / shard, _BLOCK, offset - _BLOCK)
            name = ascii(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[1:-1]
        except (OSError, tarfile.TarError):
            name = f"at byte {offset}"
        return f"{self.field}: shard {shard}, sample {name}"


def open_index(folder: Path, field: str) -> Index:
    """Open a packed data set; ``field`` begins every message. Checks sizes, not contents.

    Raises UserError if the folder, its index or a shard is missing, of another size or of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{field}: {folder} does not exist" + (" as a folder" if folder.exists() else ""))
    if not is_packed(folder):
        raise UserError(f"{field}: {folder} has no index; run python launch/pack.py index {folder}")
    try:
        index = _load(folder, field)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{field}: the index of {folder} is broken ({_one_line(error)}); make it again"
        ) from None
    _check_sizes(index)
    return index


def _load(folder: Path, field: str) -> Index:
    head = json.loads(_index_path(folder).read_text(encoding="utf-8"))
    if head["version"] != VERSION:
        raise ValueError(f"it has version {head['version']}, this code reads {VERSION}")
    shards = tuple(Shard(**shard) for shard in head["shards"])
    starts = np.cumsum([0, *(shard.n for shard in shards)], dtype=np.int64)
    offsets_N, lengths_N, labels_N = (_open_array(folder, name, int(starts[-1])) for name in ARRAYS)
    if labels_N.min() < 0 or labels_N.max() >= head["num_classes"]:
        raise ValueError(f"label.npy has labels outside 0..{head['num_classes'] - 1}")
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
    )


def is_packed(folder: Path) -> bool:
    """Say whether the folder holds a complete data set: its index.json is the last thing written."""
    return _index_path(folder).is_file()


def write_shards(
    samples: Iterable[tuple[bytes, str, int]],
    out: Path,
    class_names: Sequence[str],
    prefix: str = "data",
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> Index:
    """Write (image bytes, extension, label) in the order given; the same samples give the same bytes.

    Everything is written below OUT/.partial and renamed at the end, index.json last: whenever it is
    interrupted, OUT holds the old data set, or none. Raises UserError if OUT is taken (see ``check_free``).
    """
    check_free(out, prefix, overwrite)
    staging = out / ".partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _write_tars(samples, staging, prefix, samples_per_shard)
        build_index(staging, class_names)
        _publish(staging, out, prefix)
    except OSError as error:
        raise UserError(f"{out}: cannot write data shards: {error.strerror}") from None
    return open_index(out, str(out))


def check_free(out: Path, prefix: str = "data", overwrite: bool = False) -> None:
    """Raise UserError if OUT holds a data set (unless ``overwrite``) or tars that are not ours (always)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    if is_packed(out) and not overwrite:
        raise UserError(
            f"{out} already holds a packed data set; --overwrite replaces it, --if-missing keeps it"
        )
    foreign = sorted(path.name for path in out.glob("*.tar") if not _is_our_name(path.name, prefix))
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which is not one of {prefix}-*.tar; choose another folder"
        )
    interrupted = (out / ".partial").is_dir()
    if any(out.glob("*.tar")) and not (is_packed(out) or interrupted or overwrite):
        raise UserError(f"{out} holds data shards without an index; index them, or --overwrite them")


def build_index(folder: Path, class_names: Sequence[str] | None = None) -> Index:
    """Index all tars of a folder, ours or foreign. Without ``class_names`` those of the old index are kept.

    Raises UserError naming the shard if it is truncated, or the sample if it lacks its image or its label.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar file")
    if class_names is None:
        class_names = open_index(folder, str(folder)).class_names if is_packed(folder) else ()
    tables = [np.array(list(_scan(path)), dtype=np.int64).reshape(-1, len(ARRAYS)) for path in paths]
    table = np.concatenate(tables)
    if not len(table):
        raise UserError(f"{folder}: its .tar files hold no samples (KEY.png or another image, and KEY.cls)")
    columns = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(ARRAYS.items())}
    labels_N = columns["label"]
    num_classes = len(class_names) or int(labels_N.max()) + 1
    if labels_N.max() >= num_classes:
        raise UserError(f"{folder}: label {labels_N.max()} has no name; there are {num_classes} class names")
    shards = [
        Shard(path.name, len(rows), path.stat().st_size, _sha256(path))
        for path, rows in zip(paths, tables, strict=True)
    ]
    head = {
        "version": VERSION,
        "fingerprint": _fingerprint(shards, labels_N),
        "num_samples": len(labels_N),
        "num_classes": num_classes,
        "class_statistics": _class_statistics(labels_N, num_classes),
        "tool": f"coco-trainer index {VERSION}, webdataset {importlib.metadata.version('webdataset')}",
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "class_names": list(class_names),
    }
    try:
        _write_index(folder, head, columns)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the index: {error.strerror}") from None
    return open_index(folder, str(folder))


def _scan(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, length, label) of every sample of a tar. Raises UserError naming tar and sample."""
    sample: dict[str, tarfile.TarInfo] = {}
    key = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                match = _MEMBER.fullmatch(member.name)
                extension = match[2].lower() if match else ""
                if match is None or not member.isreg() or extension not in (*IMAGE_EXTENSIONS, "cls"):
                    continue
                part = "cls" if extension == "cls" else "image"
                if sample and (match[1] != key or part in sample):
                    yield _sample_row(path, key, sample, file)
                    sample = {}
                key = match[1]
                sample[part] = member
            if sample:
                yield _sample_row(path, key, sample, file)
            _check_end(path, file, tar.offset)  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise UserError(f"{path}: truncated or not a tar: {_one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _sample_row(
    path: Path, key: str, sample: dict[str, tarfile.TarInfo], file: BinaryIO
) -> tuple[int, int, int]:
    where = f"{path}: sample {ascii(key)[1:-1]}"
    if missing := {"image", "cls"} - sample.keys():
        raise UserError(f"{where} has no {missing.pop()} member next to its {next(iter(sample))}")
    image, label = sample["image"], sample["cls"]
    if image.issparse() or label.issparse() or not 0 < image.size <= MAX_LENGTH:
        raise UserError(f"{where}: image is sparse, empty or above 2 GiB ({image.size} bytes)")
    # The scan reads headers in order: pread leaves the position of the file alone.
    text = os.pread(file.fileno(), min(label.size, 32), label.offset_data)
    if not re.fullmatch(rb"\s*\d{1,20}\s*", text) or int(text) > MAX_LABEL:
        raise UserError(f"{where}: label must be an integer from 0 to {MAX_LABEL}, it is {ascii(text)[1:]}")
    return image.offset_data, image.size, int(text)


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raise UserError unless two zero blocks, and nothing but zeros, follow the last member.

    tarfile takes a cut at a member's boundary, and a broken header, for the end: both lose samples.
    """
    file.seek(end)
    size = 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        if chunk.count(0) != len(chunk):
            raise UserError(f"{path}: broken header, or another tar glued on, at byte {end}")
    if size < 2 * _BLOCK:
        raise UserError(f"{path}: truncated: no end of archive at byte {end}")


def _write_tars(
    samples: Iterable[tuple[bytes, str, int]], folder: Path, prefix: str, samples_per_shard: int
) -> None:
    import webdataset  # here, because it imports torch: seconds that reading and --help need not spend

    open_file: list[BinaryIO] = []

    def open_shard(name: str) -> BinaryIO:
        # Our own file: webdataset would take a path with "::" or "pipe:" in it for a command.
        open_file.append((folder / name).open("xb"))
        return open_file[-1]

    def finish_shard(_: str) -> None:
        with open_file.pop() as file:
            file.flush()
            os.fsync(file.fileno())

    # Two packs of the same data are the same bytes: webdataset's default time stamp is the clock.
    fixed = {"mtime": 0, "user": "", "group": "", "mode": 0o444, "encoder": False}
    with webdataset.ShardWriter(
        prefix.replace("%", "%%") + "-%06d.tar",
        maxcount=samples_per_shard,
        maxsize=float("inf"),
        post=finish_shard,
        verbose=0,
        opener=open_shard,
        **fixed,
    ) as writer:
        for i, (image, extension, label) in enumerate(samples):
            assert extension in IMAGE_EXTENSIONS, extension
            writer.write({"__key__": f"{i:09d}", extension: image, "cls": str(label).encode("ascii")})


def _publish(staging: Path, out: Path, prefix: str) -> None:
    """Replace the data set in ``out``: it is incomplete from the first line to the last."""
    _index_path(out).unlink(missing_ok=True)
    for path in out.glob("*.tar"):
        assert _is_our_name(path.name, prefix)
        path.unlink()
    for path in sorted(staging.glob("*.tar")):
        path.replace(out / path.name)
    (out / "index").mkdir(exist_ok=True)
    for name in ARRAYS:
        _array_path(staging, name).replace(_array_path(out, name))
    _sync_folder(out)
    _index_path(staging).replace(_index_path(out))
    _sync_folder(out / "index")
    shutil.rmtree(staging)


def _write_index(folder: Path, head: dict[str, Any], columns: dict[str, NDArray[Any]]) -> None:
    (folder / "index").mkdir(exist_ok=True)
    _index_path(folder).unlink(missing_ok=True)
    for name, column_N in columns.items():
        buffer = io.BytesIO()
        np.save(buffer, column_N, allow_pickle=False)
        _write_atomically(_array_path(folder, name), buffer.getbuffer())
    _write_atomically(_index_path(folder), (json.dumps(head, indent=1) + "\n").encode("ascii"))
    _sync_folder(folder / "index")


def _write_atomically(path: Path, content: bytes | memoryview) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_array(folder: Path, name: str, num_samples: int) -> NDArray[Any]:
    array_N = np.load(_array_path(folder, name), mmap_mode="r", allow_pickle=False)
    if array_N.shape != (num_samples,) or array_N.dtype != ARRAYS[name]:
        raise ValueError(f"{name}.npy is {array_N.dtype}{list(array_N.shape)}")
    return array_N


def _check_sizes(index: Index) -> None:
    for shard in index.shards:
        path = index.folder / shard.name
        if not path.is_file():
            raise UserError(f"{index.field}: shard {path} is missing")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"{index.field}: shard {path} has {size} bytes, its index says {shard.bytes}")


def _class_statistics(labels_N: NDArray[Any], num_classes: int) -> dict[str, float]:
    _, counts = np.unique(labels_N, return_counts=True)
    empty = num_classes - len(counts)
    smallest = 0 if empty else int(counts.min())
    return {"min": smallest, "mean": len(labels_N) / num_classes, "max": int(counts.max()), "empty": empty}


def _fingerprint(shards: Sequence[Shard], labels_N: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.n} {shard.sha256}\n".encode("ascii"))
    digest.update(labels_N.tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_our_name(name: str, prefix: str) -> bool:
    return re.fullmatch(re.escape(prefix) + r"-\d{6,}\.tar", name) is not None


def _index_path(folder: Path) -> Path:
    return folder / "index" / "index.json"


def _array_path(folder: Path, name: str) -> Path:
    return folder / "index" / f"{name}.npy"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
