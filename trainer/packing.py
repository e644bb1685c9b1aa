"""From a source to a finished data set: planned, written shard by shard in several processes, resumable.

::

    OUT/.partial/plan.json         a hash of all that the bytes depend on
    OUT/.partial/lock              held by the process that writes
    OUT/.partial/data-000000.tar   a finished shard; data-000000.npz beside it says what is in it

Which samples a shard holds, and in which order, is fixed before the first is written: so the number of
processes changes nothing, and a killed pack goes on where it was, unless the plan has changed meanwhile.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.index import MAX_IMAGE_BYTES, Index
from trainer.jobs import ONE_PROCESS, Jobs
from trainer.order import epoch_order
from trainer.shards import (
    PAIRS,
    Sample,
    Written,
    check_free,
    prepare_to_write,
    publish,
    sha256_of,
    write_shard,
)
from trainer.sources import Source, labels_of

VERSION = 1  # of what is written: another one starts interrupted packs again
PROBES = 32
TOLD_EVERY = 64
TAR_BYTES = 2048  # around one image: two headers, a label, and what fills up the blocks


def pack(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    jobs: Jobs = ONE_PROCESS,
) -> Index:
    """Write a source, shuffled, into a folder, and return its index. Same source and options: same bytes.

    ``jobs.told`` counts samples. Raises UserError if OUT is taken, the disk too small, another process is
    packing into OUT, or an image cannot be read.
    """
    check_free(out, overwrite)
    order_N, labels_N = epoch_order(len(source), seed, epoch=0), labels_of(source)
    num_shards = -(-len(source) // samples_per_shard)
    staging = out / ".partial"

    def write(number: int) -> Written:
        first = number * samples_per_shard
        chosen_N = order_N[first : first + samples_per_shard]
        if kept := _finished(staging, number):
            jobs.advance(len(chosen_N))
            return kept
        written = write_shard(staging, number, first, _samples(source, chosen_N, labels_N, jobs))
        _keep(staging, number, written)
        return written

    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _lock(staging, out):
            check_free(out, overwrite)  # another process may have finished meanwhile
            _resume(staging, _plan(source, labels_N, seed, samples_per_shard))
            _check_space(source, out)
            prepare_to_write()
            written = jobs.run(write, num_shards)
            files = {PAIRS: _pairs_csv(source, order_N)} if source.pairs else {}
            packed = publish(staging, out, written, source.class_names, files)
    except OSError as error:
        raise UserError(f"{out}: cannot write data shards: {error.strerror or error}") from None
    draw_classes(packed)
    return packed


def require_apart(out: Path, root: Path) -> None:
    """Raise UserError if OUT lies among the images that are packed: the next time it would be one of them."""
    if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies in {root}, of which all is packed; choose a folder outside")


def draw_classes(packed: Index) -> None:
    """Write index/classes.png: how many images classes have."""
    from trainer import (
        canvas,
        figures,
    )  # here, because it imports torch: a data set that is kept needs no picture

    figure = figures.class_sizes(np.asarray(packed.labels_N), packed.class_names, packed.folder.name)
    canvas.save(figure, packed.folder / "index" / "classes.png")


def summarize(packed: Index) -> dict[str, Any]:
    """Return what is in a folder: JSON."""
    lengths_N = packed.lengths_N
    return {
        "path": str(packed.folder),
        "num_samples": packed.num_samples,
        "num_classes": packed.num_classes,
        "images_per_class": packed.class_statistics,
        "image_bytes": {
            "min": int(lengths_N.min()),
            "mean": float(lengths_N.mean()),
            "max": int(lengths_N.max()),
        },
        "num_shards": len(packed.shards),
        "bytes": sum(shard.bytes for shard in packed.shards),
        "duplicates": packed.duplicates,
        "fingerprint": packed.fingerprint,
    }


def _samples(
    source: Source, chosen_N: NDArray[np.int64], labels_N: NDArray[np.int64], jobs: Jobs
) -> Iterator[Sample]:
    for count, i in enumerate(chosen_N.tolist(), 1):
        image, extension = source.read(i)
        if not 0 < len(image) <= MAX_IMAGE_BYTES:
            limit = MAX_IMAGE_BYTES >> 20
            raise UserError(f"sample {i} of class {source.classes[i]}: image is empty or above {limit} MiB")
        yield Sample(image, extension, int(labels_N[i]), source.notes and source.notes(i))
        if count % TOLD_EVERY == 0:
            jobs.advance(TOLD_EVERY)
    jobs.advance(len(chosen_N) % TOLD_EVERY)


def _plan(source: Source, labels_N: NDArray[np.int64], seed: int, samples_per_shard: int) -> str:
    """Return a hash of what the bytes depend on; of a file, its name, size and time of change."""
    digest = hashlib.sha256()
    digest.update(json.dumps([VERSION, seed, samples_per_shard, source.variant, source.class_names]).encode())
    digest.update(labels_N.tobytes())
    for path in source.files:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from None
        if not status.st_size:
            raise UserError(f"{path} is empty")
        digest.update(f"{os.fsencode(path)!r} {status.st_size} {status.st_mtime_ns}\n".encode("ascii"))
    return digest.hexdigest()


def _resume(staging: Path, plan: str) -> None:
    """Empty the folder unless it was begun with the same plan."""
    path = staging / "plan.json"
    text = json.dumps({"plan": plan})
    if path.is_file() and path.read_bytes() == text.encode():
        return
    for other in staging.iterdir():
        if other.is_dir():
            shutil.rmtree(other)
        elif other.name != "lock":
            other.unlink()
    path.write_text(text)


def _finished(staging: Path, number: int) -> Written | None:
    """Return what an earlier run has written as this shard; None unless it is there, whole and untouched."""
    path = staging / f"data-{number:06d}.tar"
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as table:
            rows, sha256 = table["rows"], str(table["sha256"])
        is_whole = rows.dtype == np.int64 and rows.ndim == 2 and sha256_of(path) == sha256
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Written(path.name, path.stat().st_size, sha256, rows) if is_whole else None


def _keep(staging: Path, number: int, written: Written) -> None:
    path = staging / f"data-{number:06d}.npz"
    temporary = path.with_suffix(".partial.npz")
    np.savez(temporary, rows=written.rows, sha256=np.array(written.sha256))
    temporary.replace(path)


@contextmanager
def _lock(staging: Path, out: Path) -> Iterator[None]:
    with (staging / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is packing into it") from None
        yield


def _check_space(source: Source, out: Path) -> None:
    """Raise UserError if what is to be written, told from a few images, is more than the disk has free."""
    probes = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(np.int64)).tolist()
    sizes = [len(source.read(i)[0]) + TAR_BYTES for i in probes]
    if source.notes:
        sizes = [size + 1024 for size in sizes]
    there = sum(path.stat().st_size for path in (out / ".partial").glob("data-*.tar"))
    needed = int(np.mean(sizes) * len(source)) - there
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: about {needed / 1e9:.2f} GB are needed, its disk has {free / 1e9:.2f} GB free"
        )


def _pairs_csv(source: Source, order_N: NDArray[np.int64]) -> bytes:
    """Name the images of all pairs by their keys in the shards."""
    place_N = np.argsort(order_N)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key1", "key2", "same", "fold"])
    for first, second, same, fold in source.pairs:
        writer.writerow([f"{place_N[first]:09d}", f"{place_N[second]:09d}", int(same), fold])
    return text.getvalue().encode("ascii")
