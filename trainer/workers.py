"""Processes that read data: forked, seen to live, and not waited for without an end.

A fork copies locks as other threads of the parent hold them. Python before 3.11.10 has one for its list of
threads, which a thread of gloo takes when it lets go of a tensor, and a child may wait for it within
``os.fork`` for ever (github.com/python/cpython/issues/112275): one in hundreds does on a busy host.
"""

import logging
import os
import select
import signal
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.signals import end_with_parent, ignore_in_worker

log = logging.getLogger("trainer")

BORN_SECONDS = 10.0
"""So long a child may take to its first instruction: it takes a millisecond."""
_TRIES = 6


def build_loader(
    batches: Dataset[Any], plan: Any, workers: int, timeout_seconds: float = 600.0
) -> DataLoader[Any]:
    """Return torch's loader of whole batches that ``workers`` make; ``plan`` is None for an IterableDataset.

    A batch that takes ``timeout_seconds`` raises RuntimeError: its worker is stuck.
    """
    return DataLoader(
        batches,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader draws from the caller's
        timeout=timeout_seconds if workers else 0,
        multiprocessing_context=_Context() if workers else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Launch(Popen):
    """Forks until a child says that it lives; ends it for good, for it ignores what asks it to end."""

    def terminate(self) -> None:
        self.kill()

    def _launch(self, process_obj: "_Worker") -> None:  # type: ignore[override]
        for _ in range(_TRIES):
            born, process_obj.birth = os.pipe()
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                os.close(process_obj.birth)
            seen = select.poll()
            seen.register(born, select.POLLIN)
            is_born = bool(seen.poll(1000 * BORN_SECONDS))  # the end of a child that died is seen too
            os.close(born)
            if is_born:
                return
            log.warning("a data worker was stuck in its fork for %g s: forked again", BORN_SECONDS)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.close()
        raise RuntimeError(f"{_TRIES} forks of a data worker were stuck for {BORN_SECONDS:g} s each")


class _Worker(ForkProcess):
    birth: int

    @staticmethod
    def _Popen(process_obj: "_Worker") -> Popen:  # type: ignore[override]
        return _Launch(process_obj)

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        os.write(self.birth, b"1")
        os.close(self.birth)
        end_with_parent()
        return super()._bootstrap(parent_sentinel)  # type: ignore[misc]


class _Context(ForkContext):
    Process = _Worker  # type: ignore[assignment]
