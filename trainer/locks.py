"""Locks that the processes of a node share: a dead holder frees its lock, a stuck one is an error.

Who holds a lock shows progress, and who waits for it gives up when there is none. A failure is left in the
lock, so that all who waited are told at once instead of trying the same thing one after another.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_POLL_SECONDS = 0.05


@dataclass
class Lock:
    """A lock that is held."""

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
def locked(path: Path, name: str, progress: Callable[[], Any], patience_seconds: float) -> Iterator[Lock]:
    """Hold the lock ``path``; the kernel frees it when its holder dies.

    Raises UserError, beginning with ``name``, if the holder makes no progress for so long, or if it has
    failed while this process waited.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        what = f"{name}: {path} is held by a process that is stuck"
        waited = wait(lambda: _try_lock(descriptor), progress, what, patience_seconds)
        if waited and (reason := os.pread(descriptor, 4096, 0)):
            raise UserError(reason.decode(errors="replace"))
        os.ftruncate(descriptor, 0)
        yield Lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_if_free(path: Path) -> Iterator[Lock | None]:
    """Hold the lock ``path``, or yield None if somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        is_mine = _try_lock(descriptor)
        if is_mine:
            os.ftruncate(descriptor, 0)
        yield Lock(descriptor) if is_mine else None
    finally:
        os.close(descriptor)


def is_free(path: Path) -> bool:
    """Say whether nobody holds the lock ``path``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def wait(done: Callable[[], bool], progress: Callable[[], Any], what: str, patience_seconds: float) -> bool:
    """Wait until ``done``; return whether it took more than one look.

    Raises UserError, beginning with ``what``, if ``progress`` stays the same for so long.
    """
    if done():
        return False
    seen, since = progress(), time.monotonic()
    while not done():
        time.sleep(_POLL_SECONDS)
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience_seconds:
            raise UserError(f"{what} for {patience_seconds:.0f} s")
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
