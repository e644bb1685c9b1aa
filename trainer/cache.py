"""Remote data sets: their index at once, their shards when first read, kept on this node's disk.

::

    CACHE/index/SHA256/index/     an index, by the hash of its index.json, which has those of its arrays
    CACHE/shards/SHA256.tar       a whole shard: never changed, only removed
    CACHE/shards/SHA256-SIZE.part what has come of one; goes on after a cut or a kill
    CACHE/locks/                  one per shard: one process of the node downloads it while others wait

A name is the content's hash: equal shards of two data sets are one file, different ones cannot meet. Room is
made before a download begins, by removing the shard whose next use lies farthest ahead (the order of an epoch
is known), or the least recently opened one where it is not. Who has a removed shard open can still read it.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.address import Url
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.index import ARRAYS, Index, Shard, array_path, index_path, load_index, open_index, read_head
from trainer.remote import LONGEST_SILENCE_SECONDS, download, download_small

MAX_INDEX_JSON = 1 << 30  # ten million class names
_POLL_SECONDS = 0.05


def open_data_set(location: Path | Url, name: str, data: DataConfig) -> Index:
    """Open a packed data set, a folder or remote; ``name`` is its field, and begins every message.

    A remote index is fetched each time, so that a change is seen; its shards are fetched when first read.
    Raises UserError, within a bounded time if the host does not answer, or for an index that is not whole.
    """
    if isinstance(location, Path):
        return open_index(location, name)
    if location.scheme == "pipe" and not data.allow_pipe:
        raise UserError(f"{name}: {location} is a command; it needs data.allow_pipe=true")
    folder, limit = cache_folder(data), int(data.cache_gib * 2**30)
    for part in ("", "index", "shards", "locks"):
        _make_private(folder / part, name)
    index = load_index(_fetch_index(location, folder, limit, name), name, location)
    largest = max(shard.bytes for shard in index.shards)
    if largest > limit:
        raise UserError(f"data.cache_gib: {data.cache_gib:g} has no room for a shard of {largest} bytes")
    return index.stored_in(ShardCache(location, folder, limit, name, index.shards, index.starts))


def cache_folder(data: DataConfig) -> Path:
    """Return where remote shards are kept."""
    if data.cache_dir is not None:
        return data.cache_dir.expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coco-trainer"


def describe_source(location: Path | Url, index: Index | None, data: DataConfig) -> str:
    """Return for the run sheet where the data comes from, and what to know of it."""
    if isinstance(location, Path) or index is None:
        return str(location)
    size = sum(shard.bytes for shard in index.shards)
    open_text = " (not encrypted)" if location.scheme == "http" else ""
    share = data.cache_gib * 2**30 / size
    room = f"room for {share:.0%} of it: shards come again and again" if share < 1 else "room for all of it"
    return f"{location}{open_text}, cached in {cache_folder(data)}, {room}"


@dataclass
class ShardCache:
    """The shards of one remote data set on this node, as ``Index`` reads them."""

    url: Url
    folder: Path
    limit: int
    name: str
    """Field of the configuration, for messages."""
    shards: tuple[Shard, ...]
    starts: NDArray[np.int64]
    _now: tuple[int, int, Callable[[int], NDArray[np.int64]]] | None = None
    _epoch_shards: tuple[int, NDArray[np.int64]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.url, self.folder, self.limit, self.name, self.shards, self.starts)

    def expect(self, epoch: int, position: int, order: Callable[[int], NDArray[np.int64]]) -> None:
        """Tell which sample is read now: number ``position`` of ``order(epoch)``. Costs nothing."""
        self._now = epoch, position, order

    def open(self, shard: Shard) -> int:
        """Return a descriptor of a shard, after fetching it if it is not there. Raises UserError."""
        path = self.folder / "shards" / f"{shard.sha256}.tar"
        if (descriptor := _open_whole(path, shard.bytes)) is not None:
            return descriptor
        partial = path.with_name(f"{shard.sha256}-{shard.bytes}.part")
        with _locked(self._lock(shard.sha256), self.name, lambda: _progress(partial)) as lock:
            if (descriptor := _open_whole(path, shard.bytes)) is not None:
                return descriptor  # another process has fetched it meanwhile
            with lock.failure_told():
                self._wait_for_room(shard, partial)
                url = self.url.file(shard.name)
                download(url, partial, self.name, size=shard.bytes, sha256=shard.sha256)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)  # before others can remove it
            partial.rename(path)
            return descriptor

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _wait_for_room(self, shard: Shard, partial: Path) -> None:
        def attempt() -> bool:
            with _locked(self._lock("room"), self.name, lambda: None):
                return self._make_room(shard, partial)

        others = self.folder / "shards"
        _wait(attempt, lambda: [_progress(path) for path in others.glob("*.part")], f"{self.name}: no room")

    def _make_room(self, shard: Shard, partial: Path) -> bool:
        """Reserve room for a shard, or return False if downloads of others have to end first."""
        parts = _stats(self.folder / "shards", "*.part")  # first: one that is renamed now is counted twice
        whole = _stats(self.folder / "shards", "*.tar")
        reserved = {path: int(path.stem.partition("-")[2]) for path in parts if path != partial}
        used = sum(stat.st_size for stat in whole.values()) + sum(reserved.values())
        excess = used + shard.bytes - self.limit
        there = parts[partial].st_size if partial in parts else 0
        missing = shard.bytes - there - shutil.disk_usage(self.folder).free
        abandoned = [path for path in reserved if _is_free(self._lock(path.stem.partition("-")[0]))]
        for path in [*abandoned, *self._victims(whole)]:
            if excess <= 0 and missing <= 0:
                break
            try:
                path.unlink()
            except FileNotFoundError:  # renamed since: what was counted is not what is there
                return False
            excess -= reserved[path] if path in reserved else whole[path].st_size
            missing -= (parts[path] if path in parts else whole[path]).st_size
        if missing > 0:
            raise UserError(f"data.cache_dir: {self.folder} is on a disk with {missing} bytes too few")
        if excess <= 0:
            partial.touch(mode=0o600)  # its name reserves the room
        return excess <= 0

    def _victims(self, whole: dict[Path, os.stat_result]) -> list[Path]:
        """Return whole shards, the first to go first: farthest next use, then least recently opened."""
        next_use = self._next_uses()
        return sorted(whole, key=lambda path: (-next_use.get(path.stem, np.inf), whole[path].st_mtime_ns))

    def _next_uses(self) -> dict[str, float]:
        """Return sha256 -> samples until the shard is read, for those this epoch still needs."""
        if self._now is None:
            return {}
        epoch, position, order = self._now
        if self._epoch_shards is None or self._epoch_shards[0] != epoch:
            shards_N = np.searchsorted(self.starts, order(epoch), side="right") - 1
            self._epoch_shards = epoch, shards_N
        ahead = self._epoch_shards[1][position:]
        first = np.full(len(self.shards), np.inf)
        first[ahead[::-1]] = np.arange(len(ahead))[::-1]  # the last to be written is the first to come
        return {shard.sha256: float(use) for shard, use in zip(self.shards, first, strict=True)}


def _fetch_index(url: Url, folder: Path, limit: int, name: str) -> Path:
    """Fetch a remote index; return the folder that holds it. The ranks of a node share one download."""
    asked_at = time.time_ns()
    lock_path = folder / "locks" / f"index-{hashlib.sha256(url.secret.encode()).hexdigest()}"
    pointer = lock_path.with_suffix(".now")
    temporary = folder / "index" / f".{lock_path.name}"
    with _locked(lock_path, name, lambda: [_progress(path) for path in temporary.rglob("*")]) as lock:
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


def _make_private(folder: Path, name: str) -> None:
    """Make a folder that only this user can change; refuse one that others can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make {folder} for {name}: {error.strerror}") from None
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002:
        raise UserError(f"data.cache_dir: {folder} can be changed by other users")


def _open_whole(path: Path, size: int) -> int | None:
    """Open a shard if it is there and whole, and note that it was used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == size:
        os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)  # a disk that lost what was synced, or another's hand
    return None


def _stats(folder: Path, pattern: str) -> dict[Path, os.stat_result]:
    found = {}
    for path in folder.glob(pattern):
        try:
            found[path] = path.stat()
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def _progress(path: Path) -> Any:
    """Return something that changes as long as a download goes on."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


@dataclass
class _Lock:
    descriptor: int

    @contextmanager
    def failure_told(self) -> Iterator[None]:
        """Leave the reason of a failure in the lock: who waits for it need not try as long again."""
        try:
            yield
        except UserError as error:
            os.pwrite(self.descriptor, str(error).encode(), 0)
            raise


@contextmanager
def _locked(path: Path, name: str, progress: Callable[[], Any]) -> Iterator[_Lock]:
    """Hold a lock of the node; the kernel frees it when its holder dies.

    Raises UserError if the holder is stuck, or has failed while this process waited.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        waited = _wait(
            lambda: _try_lock(descriptor), progress, f"{name}: {path} is held by a process that is stuck"
        )
        if waited and (reason := os.pread(descriptor, 4096, 0)):
            raise UserError(reason.decode(errors="replace"))
        os.ftruncate(descriptor, 0)
        yield _Lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _wait(done: Callable[[], bool], progress: Callable[[], Any], what: str) -> bool:
    """Wait until ``done``; return whether it took more than one look. Raises UserError if nothing moves."""
    if done():
        return False
    seen, since = progress(), time.monotonic()
    while not done():
        time.sleep(_POLL_SECONDS)
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > LONGEST_SILENCE_SECONDS:
            raise UserError(f"{what} for {LONGEST_SILENCE_SECONDS:.0f} s")
    return True
