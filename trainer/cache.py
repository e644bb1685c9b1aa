"""Remote data sets: their index at once, their shards when first read, kept on this node's disk.

::

    CACHE/index/                  see ``trainer.remote_index``
    CACHE/shards/SHA256.tar       a whole shard: never changed, only removed
    CACHE/shards/SHA256-SIZE.part what has come of one; goes on after a cut or a kill
    CACHE/locks/                  one per shard: one process of the node downloads it while others wait

A name is the content's hash: equal shards of two data sets are one file, different ones cannot meet. Room is
made before a download begins, by removing the shard whose next use lies farthest ahead (the order of an epoch
is known), or the least recently opened one where it is not. Who has a removed shard open can still read it.

Shards are also fetched ahead of their use, the next one first; one that is here makes room only for one that
is needed sooner ("do no harm": Cao et al., Integrated Prefetching and Caching Strategies, 1995).
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.address import Url
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.index import Index, Shard, load_index, open_index
from trainer.locks import Lock, is_free, locked, locked_if_free, wait
from trainer.order import Order
from trainer.remote import LONGEST_SILENCE_SECONDS, download, progress_of
from trainer.remote_index import fetch_index

_PIECE = 1 << 16  # samples of an order that are looked at together
_REST_SECONDS = 1.0  # between two looks whether there is something to fetch, if there was nothing


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
    index = load_index(fetch_index(location, folder, limit, name), name, location)
    largest = max(shard.bytes for shard in index.shards)
    if largest > limit:
        raise UserError(f"data.cache_gib: {data.cache_gib:g} has no room for a shard of {largest} bytes")
    sources = {shard.sha256: (location.file(shard.name), name) for shard in index.shards}
    return index.stored_in(ShardCache(folder, limit, name, sources, index.shards, index.starts))


def read_together(parts: Sequence[Index]) -> list[Index]:
    """Return data sets that are read in one order, as one: one cache knows which of their shards comes next.

    Folders are returned as they are.
    """
    caches = [part.store for part in parts if isinstance(part.store, ShardCache)]
    if not caches:
        return list(parts)
    shards = tuple(shard for part in parts for shard in part.shards)
    starts = np.cumsum([0, *(shard.n for shard in shards)], dtype=np.int64)
    sources = {sha256: source for cache in caches for sha256, source in cache.sources.items()}
    common = ShardCache(caches[0].folder, caches[0].limit, parts[0].field, sources, shards, starts)
    return [part if part.store is None else part.stored_in(common) for part in parts]


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
    """The shards of remote data on this node, as ``Index`` reads them."""

    folder: Path
    limit: int
    name: str
    """Field of the configuration, for messages."""
    sources: dict[str, tuple[Url, str]]
    """Where a shard comes from, by its hash, and for which field; not of one that lies in a folder."""
    shards: tuple[Shard, ...]
    """Of all that is read in one order."""
    starts: NDArray[np.int64]
    _now: tuple[int, int, Order] | None = None
    _epoch_shards: tuple[int, Order, NDArray[Any]] | None = None
    _computing: threading.Lock = field(default_factory=threading.Lock)
    _fetcher: threading.Thread | None = None
    _rest_until: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.folder, self.limit, self.name, self.sources, self.shards, self.starts)

    def expect(self, epoch: int, position: int, order: Order) -> None:
        """Tell which sample is read now: number ``position`` of an epoch of ``order``. Costs nothing."""
        self._now = epoch, position, order

    def open(self, shard: Shard) -> int:
        """Return a descriptor of a shard, after fetching it if it is not there. Raises UserError."""
        path, partial = self._paths(shard)
        if (descriptor := _open_whole(path, shard.bytes)) is not None:
            return descriptor
        with self._locked(shard.sha256, lambda: progress_of(partial)) as lock:
            if (descriptor := _open_whole(path, shard.bytes)) is not None:
                return descriptor  # another process has fetched it meanwhile
            with lock.failure_told():
                self._wait_for_room(shard)
                return self._fetch(shard)

    def fetch_ahead(self) -> None:
        """Go on fetching what this epoch needs next, in a thread beside the reader. Returns at once.

        A shard makes room only for one that is needed sooner, and what another process fetches is left to it.
        A failure ends it without a word: who needs the shard meets it again, and tells.
        """
        is_busy = self._fetcher is not None and self._fetcher.is_alive()
        if not is_busy and time.monotonic() > self._rest_until:
            self._fetcher = threading.Thread(target=self._fetch_while_possible, daemon=True)
            self._fetcher.start()

    def _fetch_while_possible(self) -> None:
        self._rest_until = np.inf
        began = time.monotonic()
        with suppress(UserError, OSError):
            while self._fetch_next():
                began = time.monotonic()
            now = time.monotonic()
            self._rest_until = now + max(_REST_SECONDS, 50 * (now - began))  # looking costs 2 % at most

    def _fetch_next(self) -> bool:
        """Fetch the shard that is needed first of those that are missing. Return False if none can be."""
        for position, shard in self._upcoming():
            path, _ = self._paths(shard)
            if shard.sha256 not in self.sources or path.exists():
                continue
            with locked_if_free(self._lock(shard.sha256)) as lock:
                if lock is None or path.exists():
                    continue
                with lock.failure_told():
                    if has_room := self._reserve(shard, position):
                        os.close(self._fetch(shard))
                    return has_room
        return False

    def _paths(self, shard: Shard) -> tuple[Path, Path]:
        """Return where a shard is when it is whole, and until then."""
        folder = self.folder / "shards"
        return folder / f"{shard.sha256}.tar", folder / f"{shard.sha256}-{shard.bytes}.part"

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _locked(self, name: str, progress: Callable[[], Any]) -> AbstractContextManager[Lock]:
        return locked(self._lock(name), self.name, progress, LONGEST_SILENCE_SECONDS)

    def _fetch(self, shard: Shard) -> int:
        """Download a shard, whose lock is held and room reserved, and open it."""
        path, partial = self._paths(shard)
        url, name = self.sources[shard.sha256]
        download(url, partial, name, size=shard.bytes, sha256=shard.sha256)
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)  # before others can remove it
        partial.rename(path)
        return descriptor

    def _wait_for_room(self, shard: Shard) -> None:
        others = self.folder / "shards"
        wait(
            lambda: self._reserve(shard, needed_at=-1),
            lambda: [progress_of(path) for path in others.glob("*.part")],
            f"{self.name}: no room",
            LONGEST_SILENCE_SECONDS,
        )

    def _reserve(self, shard: Shard, needed_at: int) -> bool:
        """Make room for a shard, by removing those that are needed later than it.

        Return False, and remove nothing, if that is not enough before downloads of others have ended.
        """
        with self._locked("room", lambda: None):
            return self._make_room(shard, self._paths(shard)[1], needed_at)

    def _make_room(self, shard: Shard, partial: Path, needed_at: int) -> bool:
        parts = _stats(self.folder / "shards", "*.part")  # first: one that is renamed now is counted twice
        whole = _stats(self.folder / "shards", "*.tar")
        on_disk = {path: status.st_size for path, status in (parts | whole).items()}
        reserved = {path: int(path.stem.partition("-")[2]) for path in parts if path != partial}
        counted = reserved | {path: on_disk[path] for path in whole}
        excess = sum(counted.values()) + shard.bytes - self.limit
        missing = shard.bytes - on_disk.get(partial, 0) - shutil.disk_usage(self.folder).free
        abandoned = [path for path in reserved if is_free(self._lock(path.stem.partition("-")[0]))]
        victims = [*abandoned, *self._victims(whole, needed_at)] if excess > 0 or missing > 0 else []
        if missing > sum(on_disk[path] for path in victims):
            raise UserError(f"data.cache_dir: {self.folder} is on a disk with {missing} bytes too few")
        if excess > sum(counted[path] for path in victims):
            return False
        for path in victims:
            if excess <= 0 and missing <= 0:
                break
            try:
                path.unlink()
            except FileNotFoundError:  # renamed since: what was counted is not what is there
                return False
            excess -= counted[path]
            missing -= on_disk[path]
        partial.touch(mode=0o600)  # its name reserves the room
        return True

    def _victims(self, whole: dict[Path, os.stat_result], needed_at: int) -> list[Path]:
        """Return the shards needed after a position; first the farthest, or else the longest not opened."""
        uses = {shard.sha256: use for use, shard in reversed(list(self._upcoming()))}
        later = [path for path in whole if uses.get(path.stem, np.inf) > needed_at]
        return sorted(later, key=lambda path: (-uses.get(path.stem, np.inf), whole[path].st_mtime_ns))

    def _upcoming(self) -> Iterator[tuple[int, Shard]]:
        """Yield (position of next use, shard) of the shards this epoch still needs, the next one first."""
        if self._now is None:
            return
        epoch, position, order = self._now
        shards_N = self._shards_in_order(epoch, order)
        is_new = np.ones(len(self.shards), dtype=bool)
        for begin in range(position, len(shards_N), _PIECE):
            numbers, places = np.unique(shards_N[begin : begin + _PIECE], return_index=True)
            for k in np.argsort(places).tolist():
                if is_new[numbers[k]]:
                    yield begin + int(places[k]), self.shards[numbers[k]]
            is_new[numbers] = False
            if not is_new.any():
                return

    def _shards_in_order(self, epoch: int, order: Order) -> NDArray[Any]:
        """Return the shard of every sample in the order of an epoch: 2 bytes each up to 65 535 shards."""
        with self._computing:
            if self._epoch_shards is None or self._epoch_shards[:2] != (epoch, order):
                samples_of = order.of_epoch(epoch)
                shards_N = np.empty(order.num_positions, dtype=np.min_scalar_type(len(self.shards)))
                for begin in range(0, len(shards_N), _PIECE):
                    piece = shards_N[begin : begin + _PIECE]
                    samples = samples_of(np.arange(begin, begin + len(piece)))
                    piece[:] = np.searchsorted(self.starts, samples, side="right") - 1
                self._epoch_shards = epoch, order, shards_N
            return self._epoch_shards[2]


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
