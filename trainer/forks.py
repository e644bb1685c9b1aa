"""Child processes that share what their parent has: forked until one lives, and ended with their parent.

A fork copies locks as other threads of the parent hold them. Python before 3.11.10 has one for its list of
threads, which a thread of gloo takes when it lets go of a tensor, and a child may wait for it within
``os.fork`` for ever (github.com/python/cpython/issues/112275): 4 of 5 280 did on a busy host. Nor does a fork
have the parent's other threads, and a child that collected its parent's garbage would wait for them: gloo's
groups, destroyed there, end it with a segmentation fault.
"""

import ctypes
import gc
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

log = logging.getLogger("trainer")

BORN_SECONDS = 10.0
"""So long a child may take to its first instruction: it takes a millisecond."""
_TRIES = 6
_PR_SET_PDEATHSIG = 1


class _Launch(Popen):
    def terminate(self) -> None:
        self.kill()

    def _launch(self, process_obj: "_Child") -> None:  # type: ignore[override]
        process_obj.collects_garbage = gc.isenabled()
        for _ in range(_TRIES):
            born, process_obj.birth = os.pipe()
            gc.disable()  # until the child has put aside what it inherits
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                os.close(process_obj.birth)
                if process_obj.collects_garbage:
                    gc.enable()
            seen = select.poll()
            seen.register(born, select.POLLIN)
            is_born = bool(seen.poll(1000 * BORN_SECONDS))  # the end of a child that died is seen too
            os.close(born)
            if is_born:
                return
            log.warning("a process was stuck in its fork for %g s: forked again", BORN_SECONDS)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.close()
        raise RuntimeError(f"{_TRIES} forks of a process were stuck for {BORN_SECONDS:g} s each")


class _Child(ForkProcess):
    birth: int
    collects_garbage: bool

    @staticmethod
    def _Popen(process_obj: "_Child") -> Popen:  # type: ignore[override]
        return _Launch(process_obj)

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        os.write(self.birth, b"1")
        os.close(self.birth)
        gc.freeze()
        if self.collects_garbage:
            gc.enable()
        _end_with_parent()
        return super()._bootstrap(parent_sentinel)  # type: ignore[misc]


def _end_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it has ended, however that came."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ForkUntilAlive(ForkContext):
    """The context of ``multiprocessing`` and torch's loader that forks so.

    What a child inherits by forking is never copied or pickled. It lives as long as the thread that forked it
    at most, and is killed where others are asked to end: it may be stuck, or told to ignore that.
    """

    Process = _Child  # type: ignore[assignment]


def bounded(items: Iterator[Any], seconds: float) -> Iterator[Any]:
    """Yield ``items``, which children make; kill them and raise RuntimeError if one takes ``seconds``.

    For a child that is frozen as a whole (SIGSTOP): this process may wait within a system call for what the
    child has to hand over, and that call ends with the child.
    """
    ended, began, is_late = threading.Event(), math.inf, False

    def watch() -> None:
        nonlocal is_late
        while not ended.wait(1.0):
            if time.monotonic() - began > seconds:
                is_late = True
                for child in active_children():
                    if isinstance(child, _Child):
                        child.kill()
                return

    threading.Thread(target=watch, name="patience", daemon=True).start()
    try:
        while True:
            began = time.monotonic()
            item = next(items, ended)
            began = math.inf
            if item is ended:
                return
            yield item
    except (OSError, EOFError, RuntimeError) as error:
        if is_late:
            raise RuntimeError(f"nothing came for {seconds:g} s: a data worker is frozen") from error
        raise
    finally:
        ended.set()
