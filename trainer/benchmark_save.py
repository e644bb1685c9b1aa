"""What a checkpoint costs on this machine: how long training stands still, and the memory to load one.

The state is that of a head of K x D float32 with momentum, which is what is large. Blocking and asynchronous
saves come in turn in the same processes; figures are those of the slowest rank, and medians over rounds.
"""

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from trainer.checkpoint import Contents, head_tensors, load_head_rows
from trainer.collectives import from_all, wait_for_all
from trainer.distributed import World, require_host_memory, require_memory
from trainer.head import ClassShard
from trainer.optimizer import allocate_state
from trainer.saving import Checkpoints


@dataclass(frozen=True, kw_only=True)
class SaveCase:
    """One measurement; ``folder`` is on the disk that is measured."""

    classes: int
    dim: int
    rounds: int
    folder: Path


class _Rows(nn.Module):
    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.rows_CD = nn.Parameter(torch.ones(num_rows, dim))


def measure_saving(case: SaveCase, world: World) -> dict[str, Any]:
    """Return the figures of one case; every rank must call it, each gets the same."""
    shard = ClassShard.of_rank(case.classes, world.rank, world.size)
    state_bytes = len(shard) * case.dim * 4 * 2
    require_memory(state_bytes, world, f"--classes {case.classes}")
    head, optimizer = _state(shard, case.dim, world.device)
    require_host_memory(state_bytes, world, f"--classes {case.classes}: the copy")
    checkpoints = Checkpoints(case.folder, 1, world.group)
    tensors = head_tensors(head, optimizer)
    checkpoints.copied(Contents(0, {}, {}, tensors, shard))  # as a run does before training
    seconds: dict[str, list[float]] = {"blocking": [], "pause": [], "pause_cpu": [], "behind": []}
    for step in range(0, 2 * case.rounds, 2):
        wait_for_all(world.group)
        start = time.perf_counter()
        checkpoints.save(Contents(step, {}, {}, tensors, shard))
        seconds["blocking"].append(_slowest(time.perf_counter() - start, world))
        contents = Contents(step + 1, {}, {}, tensors, shard)
        pause, behind, path = _save_behind(checkpoints, contents, world)
        seconds["pause"].append(_slowest(pause.seconds, world))
        seconds["pause_cpu"].append(_slowest(pause.cpu_seconds, world))
        seconds["behind"].append(_slowest(behind, world))
    del head, optimizer, tensors
    loading = _loading(path, shard, case.dim, state_bytes, world.device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "name": "checkpoint",
        "classes": case.classes,
        "dim": case.dim,
        "ranks": world.size,
        "bytes": sum(from_all(state_bytes, world.group)),
        "blocking_seconds": median["blocking"],
        "async_pause_seconds": median["pause"],
        "async_pause_cpu_seconds": median["pause_cpu"],
        "async_pause_fraction": median["pause"] / median["blocking"],
        "async_behind_seconds": median["behind"],
        "async_copy_bytes_per_rank": int(_slowest(float(state_bytes), world)),
        **{name: _slowest(value, world) for name, value in loading.items()},
    }


class _Pause:
    """Adds up the time inside its ``with`` blocks, and how much of it this thread had a processor for."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.thread_time() - self._start[1]


def _save_behind(checkpoints: Checkpoints, contents: Contents, world: World) -> tuple[_Pause, float, Path]:
    """Save as a run does; return how long training waits, the seconds until it is complete, and where."""
    start, pause, path = time.perf_counter(), _Pause(), None
    with pause:
        checkpoints.start(contents)
    while path is None:
        while _slowest(float(checkpoints.is_writing), world):  # as training asks, once a step
            time.sleep(0.01)
        with pause:
            path = checkpoints.proceed()
    return pause, time.perf_counter() - start, path


def _state(shard: ClassShard, dim: int, device: torch.device) -> tuple[nn.Module, SGD]:
    head = _Rows(len(shard), dim).to(device)
    optimizer = SGD(head.parameters(), momentum=0.9)
    allocate_state(optimizer)
    for state in optimizer.state.values():
        state["momentum_buffer"].fill_(0.5)  # else its pages do not exist
    return head, optimizer


def _loading(
    path: Path, shard: ClassShard, dim: int, state_bytes: int, device: torch.device
) -> dict[str, float]:
    """Build a state and load it; memory is what the process allocates, not the pages of files it has read."""
    before = _allocated_bytes()
    head, optimizer = _state(shard, dim, device)
    start = time.perf_counter()
    with _PeakMemory() as peak:
        load_head_rows(head, optimizer, path, shard, steps=0)
    seconds = time.perf_counter() - start
    return {"load_seconds": seconds, "load_memory_factor": (peak.most - before) / state_bytes}


class _PeakMemory:
    """The most memory allocated by this process between entering and leaving, looked at every millisecond."""

    def __enter__(self) -> "_PeakMemory":
        self.most, self._done = _allocated_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, _allocated_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _allocated_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _slowest(value: float, world: World) -> float:
    return max(from_all(value, world.group))
