"""Data shards: packed as plain webdataset tars, and indexed, ours or those of other tools.

::

    OUT/data-000000.tar ...    KEY.png KEY.cls KEY.png KEY.cls ... (any webdataset reader can read them)
    OUT/index/                 what training reads, see ``trainer.index``
    OUT/.partial/              all of it, until it is complete

The only module that imports webdataset. Array names end in their dimension: N samples.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
MAX_LABEL = MAX_LENGTH = 2**31 - 1

_OUR_NAME = re.compile(r"data-\d{6,}\.tar")
# As webdataset splits: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


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
        _write_tars(samples, staging, samples_per_shard)
        build_index(staging, class_names)
        _publish(staging, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write data shards: {error.strerror}") from None
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
        class_names = load_index(folder, str(folder)).class_names if is_packed(folder) else ()
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
    head = _describe(shards, labels_N, num_classes)
    try:
        write_index(folder, {**head, "class_names": list(class_names)}, columns)
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
        raise UserError(f"{path}: truncated or not a tar: {error}") from None
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
    if size < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: truncated: no end of archive at byte {end}")


def _write_tars(samples: Iterable[tuple[bytes, str, int]], folder: Path, samples_per_shard: int) -> None:
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
        "data-%06d.tar",
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


def _publish(staging: Path, out: Path) -> None:
    """Replace the data set in ``out``: it is incomplete from the first line to the last."""
    index_path(out).unlink(missing_ok=True)
    for path in out.glob("*.tar"):
        assert _OUR_NAME.fullmatch(path.name)
        path.unlink()
    for path in sorted(staging.glob("*.tar")):
        path.replace(out / path.name)
    move_index(staging, out)
    shutil.rmtree(staging)


def _describe(shards: Sequence[Shard], labels_N: NDArray[Any], num_classes: int) -> dict[str, Any]:
    return {
        "fingerprint": _fingerprint(shards, labels_N),
        "num_samples": len(labels_N),
        "num_classes": num_classes,
        "class_statistics": _class_statistics(labels_N, num_classes),
        "tool": f"coco-trainer, webdataset {importlib.metadata.version('webdataset')}",
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


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


def stream_samples(paths: Iterable[Path], shuffle_buffer: int, key: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield (shard and key, image bytes, label) of shards as they come, through webdataset's pipeline.

    ``key`` seeds the shuffling of so many samples. Raises UserError naming the shard that is truncated or
    broken, or the sample that lacks its image or its label: webdataset would end or go on without a word.
    """
    import webdataset

    current = [Path()]

    def opened() -> Iterator[dict[str, Any]]:
        for path in paths:
            current[0] = path
            require_end(path)
            with path.open("rb") as stream:  # not by its name, which webdataset might take for a command
                yield {"url": str(path), "stream": stream}

    files = webdataset.tariterators.tar_file_expander(opened())
    samples = webdataset.tariterators.group_by_keys(files)
    mixed = webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer // 2, rng=random.Random(key))(samples)
    try:
        for sample in mixed:
            yield _streamed(sample)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise UserError(
            f"{current[0]}: truncated or not a tar: {' '.join(str(error.args[0]).split())}"
        ) from None


def require_end(path: Path) -> None:
    """Raise UserError unless a tar ends with two zero blocks: what is cut off would not be missed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            last = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if len(last) < 2 * tarfile.BLOCKSIZE or last.count(0) != len(last):
        raise UserError(f"{path}: truncated: no end of archive")


def _streamed(sample: dict[str, Any]) -> tuple[str, bytes, int]:
    where = f"{sample['__url__']}, sample {ascii(sample['__key__'])[1:-1]}"
    images = [sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample]
    if len(images) != 1 or "cls" not in sample:
        raise UserError(
            f"{where}: needs one image and cls, it has {sorted(k for k in sample if k[0] != '_')}"
        )
    if not re.fullmatch(rb"\s*\d{1,20}\s*", sample["cls"]):
        raise UserError(f"{where}: label must be an integer, it is {ascii(sample['cls'][:32])[1:]}")
    return where, images[0], int(sample["cls"])
