"""What may befall a run, and that nothing saved is lost: afterwards the same command follows the same curve.

The normal suite sends two runs through ten faults, one after another; ``pytest -m nightly tests/faults``
sends ``FAULT_RUNS`` runs (100) through one each, at a random moment on a random rank.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet import EVERY, STEPS, Fleet
from launching import OMNIGLOT, REPOSITORY, Started, read_metrics

from trainer.manifest import complete_checkpoints, verify

# How the ranks of a run may end: -9 are those that the fault or the launcher killed.
CODES = {
    "killed": {-9, 1}, "killed at a moment": {-9, 0, 1}, "killed in a save": {-9, 1},
    "killed in a load": {-9, 1}, "stopped": {-9, 1}, "SIGTERM": {0}, "SIGUSR1": {0}, "disk full": {2},
    "tmpfs full": {2}, "not a number": {1}, "diverged": {1}, "clock": {0}, "bit flipped": {0}, "cut": {0},
}  # fmt: skip
NUM_RUNS = int(os.environ.get("FAULT_RUNS", "100"))


class Course:
    """One run on its way through faults, and the curve it has to have at its end."""

    def __init__(self, folder: Path, name: str, ranks: int, *more: str, recipe: Path | None = None) -> None:
        self.folder, self.name, self.ranks, self.more, self.recipe = folder, name, ranks, more, recipe
        self.run = folder / name

    def start(self, fault: tuple[int, str, int] | None = None, *more: str) -> Fleet:
        options = (*self.more, *more)
        return Fleet(self.folder, self.name, self.ranks, *options, recipe=self.recipe, fault=fault)

    def goes_through(self, kind: str, *, rank: int, step: int, delay: float = 0.0) -> str:
        """Let a fault happen; return what the ranks said."""
        before = len(self.said())
        if kind in ("bit flipped", "cut"):
            self.goes_through("SIGTERM", rank=rank, step=step)
            damage_newest(self.run, kind)
            self.is_refused_if_nothing_is_left()
            return ""
        if kind == "killed in a load":
            self.goes_through("SIGTERM", rank=rank, step=step)
        fleet = self.start((rank, kind, step) if kind not in ("killed at a moment", "tmpfs full") else None)
        if kind == "killed at a moment":
            time.sleep(delay)
            fleet.signal(signal.SIGKILL, rank)
        codes = fleet.wait()
        assert set(codes) <= CODES[kind], (codes, self.said()[before:])
        for path in complete_checkpoints(self.run / "checkpoints"):
            verify(path)
        return self.said()[before:]

    def is_refused_if_nothing_is_left(self) -> None:
        """A run whose only checkpoint is damaged is not begun anew until somebody has removed it."""
        [*others, newest] = complete_checkpoints(self.run / "checkpoints")
        if not others:
            before = len(self.said())
            assert set(self.start().wait()) == {2}
            assert f"damaged checkpoint: {newest / 'head-00000.safetensors'}: " in self.said()[before:]
            shutil.rmtree(newest)

    def said(self) -> str:
        log = self.folder / f"{self.name}.stderr"
        return log.read_text() if log.exists() else ""

    def ends(self) -> list[float]:
        """Return the whole curve, after going on if it has to."""
        if not (self.run / "done.json").exists():
            assert set(self.start().wait()) == {0}, self.said()
        lines = read_metrics(self.run)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        return [line["train/loss"] for line in lines]


def damage_newest(run: Path, kind: str) -> None:
    path = complete_checkpoints(run / "checkpoints")[-1] / "head-00000.safetensors"
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[-7:]
    else:
        content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.fixture(scope="session")
def curves(folder: Path) -> dict[tuple, list[float]]:
    """The curves of runs that nothing befell, made when asked for."""
    return {}


def undisturbed(
    folder: Path, curves: dict[tuple, list[float]], ranks: int, *more: str, recipe: Path | None = None
) -> list[float]:
    key = (ranks, recipe, *more)
    if key not in curves:
        curves[key] = Course(folder, f"undisturbed-{len(curves)}", ranks, *more, recipe=recipe).ends()
    return curves[key]


def test_a_run_goes_through_three_faults_and_follows_its_curve_to_the_bit(folder: Path, curves: dict) -> None:
    course = Course(folder, "befallen", 2, "checkpoint.asynchronous=true")
    said = course.goes_through("killed in a save", rank=1, step=EVERY + 2)
    assert "lost rank 1 on " in said
    assert ", last heard of at " in said  # a beat is up to a second old
    said = course.goes_through("SIGTERM", rank=1, step=STEPS - 2)
    assert "it was left by a save that did not come to its end" in said
    assert not (course.run / "done.json").exists()
    damage_newest(course.run, "bit flipped")
    assert course.ends() == undisturbed(folder, curves, 2)
    last = course.said()
    assert "head-00000.safetensors: its content is not what was written" in last
    assert (course.run / "checkpoints" / "damaged").is_dir()


def test_a_run_goes_through_seven_more_and_follows_its_curve_to_the_bit(folder: Path, curves: dict) -> None:
    course = Course(folder, "befallen-again", 2)
    for kind, rank, step in (
        ("killed", 0, 2), ("disk full", 1, 2), ("SIGUSR1", 0, 3), ("not a number", 1, 6),
        ("killed in a load", 0, 6), ("stopped", 1, 9), ("clock", 1, 9),
    ):  # fmt: skip
        assert not (course.run / "done.json").exists(), kind
        course.goes_through(kind, rank=rank, step=step)
    assert course.ends() == undisturbed(folder, curves, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_whatever_befalls_a_run_it_follows_its_curve_to_the_bit(
    folder: Path, curves: dict, number: int
) -> None:
    draw = random.Random(number)
    kinds = [kind for kind in CODES if kind != "tmpfs full"]
    kind = kinds[number % len(kinds)]
    ranks = draw.choice([2, 3]) if kind in ("stopped", "diverged") else draw.choice([1, 2, 3])
    more = draw.choice([(), ("checkpoint.asynchronous=true",), ("engine.zero_stage=2", "optim.name=adamw")])
    course = Course(folder, f"course-{number}", ranks, *more)
    every = ("engine.check_weights_every=1",) if kind == "diverged" else ()
    course.more = (*more, *every)
    course.goes_through(
        kind, rank=draw.randrange(ranks), step=draw.randint(1, STEPS - 1), delay=draw.uniform(0.0, 20.0)
    )
    assert course.ends() == undisturbed(folder, curves, ranks, *more)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What packs the data of a recipe when asked for, and returns the folder to train on."""
    root = tmp_path_factory.mktemp("recipes")

    def pack(recipe: str) -> Path:
        if recipe == "omniglot" and not OMNIGLOT.exists():
            pytest.skip(f"{OMNIGLOT} is not there")
        source = ("mnist5k",) if recipe == "demo" else ("omniglot", str(OMNIGLOT))
        done = Started(sys.executable, "launch/pack.py", *source, root / recipe, "--if-missing").wait()
        assert done.code == 0, done.stderr
        return root / recipe / ("train" if recipe == "demo" else "background")

    return pack


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["demo", "omniglot"])
@pytest.mark.parametrize("kind", ["killed", "killed in a save", "killed in a load", "SIGTERM", "bit flipped"])
def test_the_recipes_follow_their_curves_too(
    folder: Path, curves: dict, packed: Callable[[str], Path], recipe: str, kind: str
) -> None:
    more = (f"data.train={packed(recipe)}", "data.batch_size=32")
    path = REPOSITORY / "configs" / f"{recipe}.yaml"
    course = Course(folder, f"{recipe}-{kind.replace(' ', '-')}", 2, *more, recipe=path)
    course.goes_through(kind, rank=1, step=2 * EVERY)
    assert course.ends() == undisturbed(folder, curves, 2, *more, recipe=path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB: one checkpoint of the run has room, two have not."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("this machine does not let root mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.nightly
def test_a_full_disk_ends_the_run_with_its_name_and_more_room_lets_it_go_on(
    folder: Path, curves: dict, small_disk: Path
) -> None:
    course = Course(small_disk, "full", 2, f"data.train={folder / 'packed'}")
    said = course.goes_through("tmpfs full", rank=0, step=0)
    assert "bytes, " in said
    assert "are free" in said
    assert len(complete_checkpoints(course.run / "checkpoints")) == 1
    subprocess.run(["mount", "-o", "remount,size=400m", small_disk], check=True)
    assert course.ends() == undisturbed(folder, curves, 2)
