"""Data shards: packed as plain webdataset tars, and indexed, ours or those of other tools.

::

    OUT/data-000000.tar ...    KEY.cls KEY.png [KEY.json] ... (any webdataset reader can read them)
    OUT/index/                 what training reads, see ``trainer.index``
    OUT/.partial/              all of it, until it is complete; beside each finished tar, what is in it

A tar is a function of its samples alone, so tars may be written in any order, by any number of processes.
The only module that imports webdataset. Array names end in their dimension: N samples.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.index import (
    ARRAYS,
    Index,
    Shard,
    index_path,
    is_packed,
    load_index,
    move_index,
    open_index,
    write_index,
)
from trainer.jobs import ONE_PROCESS, Jobs
from trainer.tars import IMAGE_EXTENSIONS, scan_tar

PAIRS = "pairs.csv"

_OUR_NAME = re.compile(r"data-\d{6,}\.tar")
_INDEXED_NAME = re.compile(r"[^.-][^\\]*\Z")  # as trainer.index reads them


class Sample(NamedTuple):
    """One sample to be written."""

    image: bytes
    extension: str
    label: int
    note: dict[str, Any] | None = None
    """Content of KEY.json."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A finished tar: what the index says of it."""

    name: str
    bytes: int
    sha256: str
    rows: NDArray[np.int64]
    """offset, length, label and hash of the content of every image: (number of images, 4)."""


def write_shards(
    samples: Iterable[tuple[bytes, str, int]],
    out: Path,
    class_names: Sequence[str],
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> Index:
    """Write (image bytes, extension, label) in the order given; the same samples give the same bytes.

    Everything is written below OUT/.partial and renamed at the end, index.json last: whenever it is
    interrupted, OUT holds the old data set, or none. Raises UserError if OUT is taken (see ``check_free``).
    """
    check_free(out, overwrite)
    staging = out / ".partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        rest = (Sample(*sample) for sample in samples)
        written: list[Written] = []
        for first in rest:
            batch = chain([first], islice(rest, samples_per_shard - 1))
            written.append(write_shard(staging, len(written), len(written) * samples_per_shard, batch))
        return publish(staging, out, written, class_names)
    except OSError as error:
        raise UserError(f"{out}: cannot write data shards: {error.strerror}") from None


def prepare_to_write() -> None:
    """Import what writes tars: once, before processes are forked that would each spend seconds on it."""
    import webdataset  # noqa: F401


def write_shard(staging: Path, number: int, first: int, samples: Iterable[Sample]) -> Written:
    """Write tar ``number``, whose first sample has the key ``first``; whole under its name, or not at all."""
    import webdataset  # here, because it imports torch: seconds that reading and --help need not spend

    name = f"data-{number:06d}.tar"
    path = staging / f"{name}.partial"
    rows = []
    with path.open("wb") as file:
        stream = _Hashed(file)
        # Two packs of the same data are the same bytes: webdataset's default time stamp is the clock.
        fixed = {"mtime": 0, "user": "", "group": "", "mode": 0o444, "encoder": False}
        with webdataset.TarWriter(stream, **fixed) as writer:
            writer.tarstream.format = tarfile.USTAR_FORMAT  # what it means: the same bytes, 20 % sooner
            for key, sample in enumerate(samples, first):
                assert sample.extension in IMAGE_EXTENSIONS, sample.extension
                members = {sample.extension: sample.image, "cls": str(sample.label).encode("ascii")}
                if sample.note is not None:
                    members["json"] = json.dumps(sample.note, sort_keys=True).encode("ascii")
                offset = writer.tarstream.offset + tarfile.BLOCKSIZE
                for extension in sorted(members):  # as webdataset writes them
                    if extension == sample.extension:
                        break
                    offset += tarfile.BLOCKSIZE + _blocks(len(members[extension]))
                writer.write({"__key__": f"{key:09d}", **members})
                rows.append((offset, len(sample.image), sample.label, content_hash(sample.image)))
        file.flush()
        os.fsync(file.fileno())
    path.replace(staging / name)
    return Written(
        name, stream.size, stream.digest.hexdigest(), np.array(rows, dtype=np.int64).reshape(-1, 4)
    )


def content_hash(image: bytes) -> int:
    """Return 63 bits that tell images apart: the odds that any two of 20 million collide are 1 to 46 000."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") >> 1


def publish(
    staging: Path,
    out: Path,
    written: Sequence[Written],
    class_names: Sequence[str],
    files: Mapping[str, bytes] | None = None,
) -> Index:
    """Replace the data set in ``out`` by finished tars and ``files``; OUT is incomplete meanwhile."""
    _write_table(staging, written, class_names)
    index_path(out).unlink(missing_ok=True)
    for path in [*out.glob("*.tar"), out / PAIRS]:
        assert path.name == PAIRS or _OUR_NAME.fullmatch(path.name)
        path.unlink(missing_ok=True)
    for name, content in (files or {}).items():
        (out / name).write_bytes(content)
    for shard in written:
        (staging / shard.name).replace(out / shard.name)
    move_index(staging, out)
    shutil.rmtree(staging)
    return open_index(out, str(out))


def check_free(out: Path, overwrite: bool = False) -> None:
    """Raise UserError if OUT holds a data set (unless ``overwrite``) or tars that are not ours (always)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    if is_packed(out) and not overwrite:
        raise UserError(
            f"{out} already holds a packed data set; --overwrite replaces it, --if-missing keeps it"
        )
    foreign = sorted(path.name for path in out.glob("*.tar") if not _OUR_NAME.fullmatch(path.name))
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which is not one of data-*.tar; choose another folder")
    interrupted = (out / ".partial").is_dir()
    if any(out.glob("*.tar")) and not (is_packed(out) or interrupted or overwrite):
        raise UserError(f"{out} holds data shards without an index; index them, or --overwrite them")


def build_index(folder: Path, class_names: Sequence[str] | None = None, jobs: Jobs = ONE_PROCESS) -> Index:
    """Index all tars of a folder, ours or foreign. Without ``class_names`` those of the old index are kept.

    Raises UserError naming the shard if it is truncated, or the sample if it lacks its image or its label.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar file")
    if wrong := [
        path.name for path in paths if not (_INDEXED_NAME.match(path.name) and path.name.isprintable())
    ]:
        raise UserError(
            f"{folder}: {wrong[0]!a} begins with - or ., has a \\ or cannot be printed; rename it"
        )
    if class_names is None:
        class_names = load_index(folder, str(folder)).class_names if is_packed(folder) else ()
    scanned = jobs.run(lambda i: _scan(paths[i]), len(paths))
    try:
        _write_table(folder, scanned, class_names)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the index: {error.strerror}") from None
    return open_index(folder, str(folder))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed:
    """A file for tarfile that knows the SHA-256 of what was written: reading it again would cost as much."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self.digest.update(content)
        self.size += len(content)
        self._file.write(content)


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _scan(path: Path) -> Written:
    rows = []
    try:
        with path.open("rb") as file:
            for sample in scan_tar(path):
                image = os.pread(file.fileno(), sample.length, sample.offset)
                rows.append((sample.offset, sample.length, sample.label, content_hash(image)))
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return Written(path.name, path.stat().st_size, sha256_of(path), table)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _write_table(folder: Path, written: Sequence[Written], class_names: Sequence[str]) -> None:
    """Write the index of a folder of tars."""
    table = np.concatenate([np.empty((0, 4), dtype=np.int64), *(shard.rows for shard in written)])
    shards = [Shard(shard.name, len(shard.rows), shard.bytes, shard.sha256) for shard in written]
    if not len(table):
        raise UserError(f"{folder}: its .tar files hold no samples (KEY.png or another image, and KEY.cls)")
    columns = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(ARRAYS.items())}
    labels_N = columns["label"]
    num_classes = len(class_names) or int(labels_N.max()) + 1
    if labels_N.max() >= num_classes:
        raise UserError(f"{folder}: label {labels_N.max()} has no name; there are {num_classes} class names")
    head = {**_describe(shards, labels_N, num_classes), "duplicates": _duplicates(table[:, 3], labels_N)}
    write_index(folder, {**head, "class_names": list(class_names)}, columns)


def _duplicates(hashes_N: NDArray[np.int64], labels_N: NDArray[Any]) -> dict[str, int]:
    """Count images that are the copy of another, and of these those whose labels disagree."""
    order = np.lexsort((labels_N, hashes_N))
    hashes_N, labels_N = hashes_N[order], labels_N[order]
    same_N = hashes_N[1:] == hashes_N[:-1]
    return {
        "images": int(same_N.sum()),
        "of_other_classes": int((same_N & (labels_N[1:] != labels_N[:-1])).sum()),
    }


def _describe(shards: Sequence[Shard], labels_N: NDArray[Any], num_classes: int) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint_of(shards, labels_N),
        "num_samples": len(labels_N),
        "num_classes": num_classes,
        "class_statistics": class_statistics(labels_N, num_classes),
        "tool": f"coco-trainer, webdataset {importlib.metadata.version('webdataset')}",
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


def class_statistics(labels_N: NDArray[Any], num_classes: int) -> dict[str, float]:
    """Return images per class: ``min``, ``mean``, ``max``; ``empty`` counts classes without any."""
    _, counts = np.unique(labels_N, return_counts=True)
    empty = num_classes - len(counts)
    smallest = 0 if empty else int(counts.min())
    return {"min": smallest, "mean": len(labels_N) / num_classes, "max": int(counts.max()), "empty": empty}


def fingerprint_of(shards: Sequence[Shard], labels_N: NDArray[Any]) -> str:
    """Return a hash of all images, labels and their order."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.n} {shard.sha256}\n".encode("ascii"))
    digest.update(labels_N.tobytes())
    return digest.hexdigest()


def webdataset_loader(folder: Path, decode_image: Callable[[Any], Any] | None, shuffle_buffer: int) -> Any:
    """Return webdataset's own iterable of (image, label) as its users write it, to compare with.

    Without ``decode_image`` both are bytes; else PIL decodes in colour, and the image passes through it.
    """
    import webdataset

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(paths, shardshuffle=len(paths) if shuffle_buffer else False)
    if shuffle_buffer:
        samples = samples.shuffle(shuffle_buffer)
    if decode_image is None:
        return samples.to_tuple(";".join(IMAGE_EXTENSIONS), "cls")
    decoded = samples.decode("pil").to_tuple(";".join(IMAGE_EXTENSIONS), "cls")
    return decoded.map_tuple(decode_image, int)


def webdataset_samples(
    members: Iterable[dict[str, Any]], shuffle_buffer: int, key: int
) -> Iterator[dict[str, Any]]:
    """Yield the samples of members of tars through webdataset's pipeline, each a mapping by extension.

    A member is {"fname", "data", "__url__"}, and {} comes after the last one of a tar. ``key`` seeds the
    shuffling of so many samples.
    """
    import webdataset

    samples = webdataset.tariterators.group_by_keys(members)
    return webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer // 2, rng=random.Random(key))(samples)


def expand_braces(address: str) -> list[str]:
    """Return the addresses that one with braces stands for, as webdataset has them: set-{000..146}.tar."""
    import webdataset

    return webdataset.shardlists.expand_urls(address)
