"""Independent pieces of work in several processes, with progress, that end with the process that asked.

Forked, so that what a piece needs is inherited and never copied or pickled; results travel back.
"""

import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.errors import UserError
from trainer.forks import ForkUntilAlive

Result = TypeVar("Result")

PROGRESS_SECONDS = 0.2

_state: dict[str, Any] = {}
"""Of a child process: what it was forked to do."""


def _no_progress(count: int) -> None:
    pass


@dataclass(frozen=True)
class Jobs:
    """How work is done: in how many processes, and who is told of the progress."""

    processes: int = 1
    told: Callable[[int], None] = _no_progress
    """Called in the first process with the number of units done since the last call."""

    def advance(self, count: int) -> None:
        """Say that ``count`` units are done. Called by the pieces of work, in any process."""
        if _state:
            with _state["done"].get_lock():
                _state["done"].value += count
        else:
            self.told(count)

    def run(self, work: Callable[[int], Result], count: int) -> list[Result]:
        """Return work(0) .. work(count - 1). A first exception ends it; pieces under way are finished."""
        if min(self.processes, count) <= 1:
            return [work(i) for i in range(count)]
        context = ForkUntilAlive()
        done = context.Value("q", 0)
        pool = ProcessPoolExecutor(min(self.processes, count), context, _begin, (work, done))
        with pool:
            futures = [pool.submit(_do, i) for i in range(count)]
            try:
                self._follow(set(futures), done)
            except BrokenProcessPool:
                raise UserError(
                    f"--jobs {self.processes}: a process was killed (memory?); try fewer"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]

    def _follow(self, waiting: set[Future[Any]], done: Any) -> None:
        told = 0
        while waiting:
            finished, waiting = wait(waiting, PROGRESS_SECONDS, FIRST_EXCEPTION)
            self.told(done.value - told)
            told = done.value
            for future in finished:
                future.result()


ONE_PROCESS = Jobs()


def _begin(work: Callable[[int], Any], done: Any) -> None:
    """Begin a child: Ctrl-C is the parent's."""
    _state.update(work=work, done=done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(i: int) -> Any:
    return _state["work"](i)
