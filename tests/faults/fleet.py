"""A run as processes that may be killed, and the faults that befall it.

Its ranks are forked like those of ``tests/ranks.py`` and do what ``launch/train.py`` does: train, and end
with an exit code. A fault is set up inside one rank before it trains.
"""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from launching import options, read_metrics
from ranks import _server
from torch.distributed import TCPStore

STEPS, EVERY = 9, 3
TIMEOUT_SECONDS = 6.0
BOUND_SECONDS = 60.0
"""All processes are gone by then: the timeout, looking who is lost, and a busy machine."""


class Fleet:
    """All ranks of one run, small or of a recipe. ``fault`` is (rank, name in ``FAULTS``, step)."""

    def __init__(
        self,
        folder: Path,
        name: str,
        ranks: int,
        *more: str,
        recipe: Path | None = None,
        fault: tuple[int, str, int] | None = None,
    ) -> None:
        self.run, self.log = folder / name, folder / f"{name}.stderr"
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks: list[ForkServerProcess] = []
        for rank in range(ranks):
            own = fault if fault and fault[0] == rank else None
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            command = (recipe, arguments_of(folder, name, recipe, *more))
            arguments = (environment, command, own, self.log)
            process = _server.Process(target=_rank_main, args=arguments)
            process.start()
            self.ranks.append(process)

    def signal(self, number: int, rank: int) -> None:
        """Send a signal to a rank that still runs."""
        pid = self.ranks[rank].pid
        if pid and self.ranks[rank].is_alive():
            os.kill(pid, number)

    def wait(self, *, launcher_kills: bool = True) -> list[int | None]:
        """Return the exit codes once all have ended.

        Like a launcher it kills the rest when one has failed: a stopped process cannot end by itself.
        """
        deadline = time.monotonic() + BOUND_SECONDS
        while any(rank.exitcode is None for rank in self.ranks):
            running = [number for number, rank in enumerate(self.ranks) if rank.exitcode is None]
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ranks {running} still ran:\n{self.log.read_text()[-3000:]}")
            ended = [rank.exitcode for rank in self.ranks if rank.exitcode is not None]
            if launcher_kills and len(running) == 1 and any(ended) and self._is_stopped(running[0]):
                self.ranks[running[0]].kill()
            time.sleep(0.02)
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        """End all processes."""
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def steps_done(self) -> int:
        """Return how many steps are in the metrics."""
        return len(read_metrics(self.run)) if (self.run / "metrics.jsonl").exists() else 0

    def _is_stopped(self, rank: int) -> bool:
        try:
            return "State:\tT" in Path(f"/proc/{self.ranks[rank].pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended, its exit code is still on its way
            return False


def arguments_of(folder: Path, name: str, recipe: Path | None, *more: str) -> list[str]:
    """Return the command line of a run: that of a small one, or what cuts a recipe short."""
    if recipe is None:
        basis = [*options(folder, name), "optim.warmup_steps=3", "eval.classification={}"]
    else:
        basis = [
            f"run.root={folder}", f"run.name={name}", "optim.epochs=null", "log.every_steps=1",
            "log.wandb=disabled", "log.report=false",
        ]  # fmt: skip
    return [
        *basis, f"optim.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=2",
        "data.workers=0", f"engine.timeout_seconds={TIMEOUT_SECONDS}", *more,
    ]  # fmt: skip


def _rank_main(
    environment: dict[str, str],
    command: tuple[Path | None, list[str]],
    fault: tuple[int, str, int] | None,
    log: Path,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from launch._main import run
    from trainer import loop
    from trainer.log import configure_logging
    from trainer.options import load

    if fault:
        FAULTS[fault[1]](fault[2])

    def main() -> None:
        config = load(*command)
        configure_logging(config.run_folder, int(environment["RANK"]))
        loop.train(config)

    run(main)


def at_step(step: int, act: Callable[[], Any]) -> None:
    """Do something in the training of ``step`` (from 1)."""
    from trainer import loop

    plain = loop.learning_rate

    def learning_rate(config: Any, number: int) -> float:
        if number + 1 == step:
            act()
        return plain(config, number)

    loop.learning_rate = learning_rate


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def die_in_save(step: int) -> None:
    """Write half of the first file after ``step``, then die."""
    at_step(step, lambda: _half_written(signal_self(signal.SIGKILL)))


def _half_written(act: Callable[[], None]) -> None:
    from trainer import checkpoint

    def write(path: Path, *_: Any) -> None:
        path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
        act()

    checkpoint.write_tensors = write


def die_in_load(_step: int) -> None:
    """Die after the first rows were read."""
    from trainer import checkpoint

    plain = checkpoint.stream_rows

    def stream_rows(*arguments: Any) -> Any:
        for item in plain(*arguments):
            yield item
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.stream_rows = stream_rows


def disk_full(step: int) -> None:
    """From ``step`` on no file can grow beyond 4 kB; a rank with a few rows only is told so by force."""
    from trainer import checkpoint

    def limit() -> None:
        if os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        else:
            checkpoint.write_tensors = no_space

    def no_space(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    at_step(step, limit)


def not_a_number(step: int) -> None:
    """The gradient of one weight of this rank is NaN in ``step``."""
    from trainer.joint import JointStep

    plain = JointStep.__call__

    def call(self: Any, images: Any, labels: Any, lr: float, number: int) -> Any:
        if number + 1 != step:
            return plain(self, images, labels, lr, number)
        weight = next(self.engine.module.parameters())
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return plain(self, images, labels, lr, number)
        finally:
            hook.remove()

    JointStep.__call__ = call  # type: ignore[method-assign]


def diverge(step: int) -> None:
    """One bit of this rank's copy of a weight changes after ``step``."""
    from trainer.joint import JointStep

    plain = JointStep.__call__

    def call(self: Any, images: Any, labels: Any, lr: float, number: int) -> Any:
        output = plain(self, images, labels, lr, number)  # ZeRO sends the weights anew within it
        if number + 1 == step:
            weight = next(self.engine.module.parameters()).detach().view(-1)
            weight.view(torch.int32)[0] ^= 1
        return output

    JointStep.__call__ = call  # type: ignore[method-assign]


def clock_jumps(step: int) -> None:
    """The wall clock goes back by a day in ``step``."""
    plain = time.time

    def jump() -> None:
        time.time = lambda: plain() - 86400

    at_step(step, jump)


FAULTS: dict[str, Callable[[int], None]] = {
    "killed": lambda step: at_step(step, signal_self(signal.SIGKILL)),
    "killed in a save": die_in_save,
    "killed in a load": die_in_load,
    "stopped": lambda step: at_step(step, signal_self(signal.SIGSTOP)),
    "SIGTERM": lambda step: at_step(step, signal_self(signal.SIGTERM)),
    "SIGUSR1": lambda step: at_step(step, signal_self(signal.SIGUSR1)),
    "disk full": disk_full,
    "not a number": not_a_number,
    "diverged": diverge,
    "clock": clock_jumps,
}
