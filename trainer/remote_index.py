"""The index of a remote data set: fetched whole, each time it is opened, so that a change is seen.

::

    CACHE/index/SHA256/index/     an index, by the hash of its index.json, which has those of its arrays
"""

import hashlib
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.address import Url
from trainer.errors import UserError
from trainer.index import ARRAYS, array_path, index_path, load_index, read_head
from trainer.locks import locked
from trainer.remote import LONGEST_SILENCE_SECONDS, download, download_small, progress_of

MAX_INDEX_JSON = 1 << 30  # ten million class names


def fetch_head(url: Url, name: str) -> dict[str, Any]:
    """Return what the index.json of a remote data set says, keeping nothing. Raises UserError."""
    with TemporaryDirectory() as folder:
        path = index_path(Path(folder))
        path.parent.mkdir()
        download_small(url.file("index/index.json"), path, name, limit=MAX_INDEX_JSON)
        return read_head(Path(folder), name, url)


def fetch_index(url: Url, folder: Path, limit: int, name: str) -> Path:
    """Fetch a remote index; return the folder that holds it. The ranks of a node share one download.

    ``limit`` is the most bytes that its arrays may have. Raises UserError.
    """
    asked_at = time.time_ns()
    lock_path = folder / "locks" / f"index-{hashlib.sha256(url.secret.encode()).hexdigest()}"
    pointer = lock_path.with_suffix(".now")
    temporary = folder / "index" / f".{lock_path.name}"

    with locked(lock_path, name, lambda: _progress(temporary), LONGEST_SILENCE_SECONDS) as lock:
        if pointer.exists() and pointer.stat().st_mtime_ns >= asked_at:  # fetched while this process waited
            return folder / "index" / pointer.read_text()
        with lock.failure_told():
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "index").mkdir(parents=True)
            head_path = index_path(temporary)
            download_small(url.file("index/index.json"), head_path, name, limit=MAX_INDEX_JSON)
            target = folder / "index" / hashlib.sha256(head_path.read_bytes()).hexdigest()
            if not target.exists():
                _fetch_arrays(url, temporary, limit, name)
                temporary.rename(target)
        fresh = pointer.with_suffix(".new")
        fresh.write_text(target.name)
        fresh.replace(pointer)
    return target


def _progress(folder: Path) -> Any:
    """Return something that changes as long as an index arrives in a folder, which may go at any moment."""
    return [progress_of(path) for path in (index_path(folder), *(array_path(folder, a) for a in ARRAYS))]


def _fetch_arrays(url: Url, folder: Path, limit: int, name: str) -> None:
    """Fetch what a fetched index.json names."""
    arrays = read_head(folder, name, url).get("arrays", {})
    if arrays.keys() != ARRAYS.keys():
        raise UserError(
            f"{name}: the index of {url} has no hashes of its arrays; pack.py index makes a new one"
        )
    if (size := sum(array["bytes"] for array in arrays.values())) > limit:
        raise UserError(f"{name}: the index of {url} has {size} bytes, above data.cache_gib")
    for array, entry in arrays.items():
        path = array_path(folder, array)
        download(url.file(f"index/{path.name}"), path, name, size=entry["bytes"], sha256=entry["sha256"])
    load_index(folder, name, url)
