"""Forked processes live, or are forked again; one that is stuck is not waited for without an end."""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from launching import REPOSITORY
from torch.utils.data import Dataset

from trainer import data, forks
from trainer.data import build_loader
from trainer.jobs import Jobs

NUM_BATCHES = 3
_forks: list[int] = []
_stuck_forks = 0


class Numbers(Dataset):
    def __init__(self, slow: int | None = None) -> None:
        self.slow = slow

    def __getitem__(self, i: int) -> tuple[int, int]:
        if i == self.slow:
            time.sleep(1e4)
        return i, os.getpid()


def _count_fork() -> None:
    _forks.append(1)


def _stick() -> None:
    """Within ``os.fork``, as a child that waits for a lock which nobody holds any more."""
    if len(_forks) <= _stuck_forks:
        time.sleep(1e4)


os.register_at_fork(before=_count_fork, after_in_child=_stick)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Return how many of the next forks are to stick."""
    monkeypatch.setattr(forks, "BORN_SECONDS", 0.5)
    caplog.set_level(logging.WARNING, "trainer")

    def begin(count: int) -> None:
        _forks.clear()
        monkeypatch.setitem(globals(), "_stuck_forks", count)

    return begin


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_worker_stuck_in_its_fork_is_forked_again(stuck, caplog) -> None:
    stuck(2)
    before, old = open_files(), children()
    batches = list(build_loader(Numbers(), range(NUM_BATCHES), 2))
    assert [i for i, _ in batches] == [0, 1, 2]
    assert len({process for _, process in batches}) == 2
    assert len(_forks) == 4
    assert caplog.messages == ["a process was stuck in its fork for 0.5 s: forked again"] * 2
    assert children() <= old  # neither a zombie nor a stuck one is left
    begin = time.monotonic()
    while open_files() > before:  # threads of the loader's queues close theirs
        gc.collect()
        assert time.monotonic() - begin < 10
        time.sleep(0.05)


class Group:
    """As a group of gloo: garbage that only the process which made it can destroy."""

    destroyed_by: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.made_by, self.itself = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.made_by:
            os.kill(os.getpid(), signal.SIGSEGV)
        Group.destroyed_by.append(self.made_by)


def _collect_garbage() -> None:
    Group()
    gc.collect()
    assert Group.destroyed_by == [os.getpid()]


def _expect_collection(enabled: bool) -> None:
    assert gc.isenabled() == enabled


def _exit_code_of(work: Callable[..., None], *arguments: bool) -> int | None:
    child = forks.ForkUntilAlive().Process(target=work, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def test_a_child_collects_its_own_garbage_and_leaves_its_parents_alone(monkeypatch) -> None:
    gc.collect()
    monkeypatch.setattr(Group, "destroyed_by", [])
    assert _exit_code_of(_expect_collection, True) == 0
    gc.disable()
    try:
        Group()
        assert _exit_code_of(_expect_collection, False) == 0
        assert _exit_code_of(_collect_garbage) == 0
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.collect()
    assert Group.destroyed_by == [os.getpid()]


def test_jobs_are_done_by_processes_that_live(stuck) -> None:
    stuck(1)
    done = Jobs(2).run(lambda i: (i, os.getpid()), 4)
    assert [i for i, _ in done] == [0, 1, 2, 3]
    assert os.getpid() not in {process for _, process in done}
    assert len(_forks) == 3


def test_a_host_where_no_fork_lives_is_an_error(stuck) -> None:
    stuck(100)
    with pytest.raises(RuntimeError, match=r"^6 forks of a process were stuck for 0\.5 s each$"):
        list(build_loader(Numbers(), range(NUM_BATCHES), 1))


def test_a_worker_that_does_not_return_a_batch_is_not_waited_for_without_an_end() -> None:
    batches = iter(build_loader(Numbers(slow=1), range(NUM_BATCHES), 1, timeout_seconds=1))
    assert next(batches)[0] == 0
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out after 1"):
        next(batches)
    assert time.monotonic() - begin < 10  # torch waits 5 s for a worker to end before it is killed
    assert not active_children()


class Arrays(Dataset):
    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((4,), i)


def test_a_worker_frozen_while_it_hands_over_a_batch_is_not_waited_for_without_an_end(monkeypatch) -> None:
    monkeypatch.setattr(data, "_GRACE_SECONDS", 1.0)
    batches = iter(build_loader(Arrays(), range(NUM_BATCHES), 1, timeout_seconds=1))
    assert next(batches).tolist() == [0] * 4
    time.sleep(1.0)  # the second is ready, but its memory is still the worker's
    [worker] = active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^nothing came for 2 s: a data worker is frozen$"):
        list(batches)
    assert time.monotonic() - begin < 10
    assert not active_children()


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_stuck_worker_ends_with_its_rank(end: str) -> None:
    code = f"""
import os, sys, time
from trainer.data import build_loader

class Stuck:
    def __getitem__(self, i):
        if i == 0:
            return os.getpid()
        time.sleep(1e4)

batches = iter(build_loader(Stuck(), [0, 1], 1))
print(next(batches), flush=True)
{end}
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode in (3, -9)
    while is_running(int(done.stdout)):
        assert time.monotonic() - begin < 50
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_without_workers_batches_are_read_here() -> None:
    assert list(build_loader(Numbers(), range(2), 0, timeout_seconds=1)) == [
        (0, os.getpid()),
        (1, os.getpid()),
    ]
