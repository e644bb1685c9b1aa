"""Starting the real entry points as a user does, on free ports, with an end to every wait."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OMNIGLOT = Path(os.environ.get("OMNIGLOT_ZIP", REPOSITORY.parent / "shared" / "data" / "omniglot.zip"))


@dataclass
class Finished:
    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


class Started:
    """A command in a process group of its own, so that everything it started ends with it."""

    def __init__(self, *command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def wait(self, timeout: float = 300) -> Finished:
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            stdout, stderr = self.process.communicate()
            raise AssertionError(
                f"still running after {timeout} s:\n{stdout[-3000:]}\n{stderr[-3000:]}"
            ) from None
        return Finished(self.process.returncode, stdout, stderr)


def start_train(ranks: int, *overrides: str, launcher: str = "deepspeed", **environment: str) -> Started:
    """Start launch/train.py on so many ranks: by the named launcher, or plain python for one."""
    script = REPOSITORY / "launch" / "train.py"
    if ranks == 1:
        return Started(sys.executable, script, *overrides, **environment)
    if launcher == "torchrun":
        port = ("--master-port", str(free_port()), "--nproc-per-node", str(ranks))
        return Started(BIN / "torchrun", *port, script, *overrides, **environment)
    options = ("--num_gpus", str(ranks), "--master_port", str(free_port()))
    return Started(BIN / "deepspeed", *options, script, *overrides, **environment)


def make_data(root: Path) -> Path:
    """Write seven classes of noisy 20 x 20 patterns below ``root`` and pack them by the real command."""
    generator = np.random.default_rng(0)
    for label in range(7):
        pattern = generator.integers(0, 200, (20, 20, 3))
        for i in range(12):
            image = np.clip(pattern + generator.integers(0, 56, (20, 20, 3)), 0, 255).astype(np.uint8)
            path = root / "images" / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    pack = Started(sys.executable, "launch/pack.py", "imagefolder", root / "images", root / "packed").wait()
    assert pack.code == 0, pack.stderr
    return root


def options(folder: Path, name: str, *more: str) -> list[str]:
    """Return a small run on ``make_data``'s shards, with batch norm, so that statistics over ranks are tried.

    Its learning rate is small: training doubles any rounding difference every few steps, and a network in
    turmoil would show that instead of whether two runs compute the same thing.
    """
    return [
        f"data.train={folder / 'packed'}", "data.batch_size=12", "data.workers=1",
        "backbone.name=resnet10t", "backbone.image_size=24", "backbone.embedding_dim=16",
        "optim.lr=0.005", "optim.steps=30", "optim.warmup_steps=10", "optim.clip_norm=1", "augment.flip=0.5",
        "engine.dtype=float32", "log.every_steps=1", "log.wandb=disabled", "log.report=false",
        f"run.root={folder}",
        f"run.name={name}", f"eval.classification.same={folder / 'packed'}", *more,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
