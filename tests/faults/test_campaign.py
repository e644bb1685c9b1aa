"""What may befall a run, and that nothing saved is lost: afterwards the same command follows the same curve.

The normal suite takes three faults; ``pytest -m nightly tests/faults`` a hundred at random moments.
"""

from pathlib import Path

import pytest
from fleet import EVERY, STEPS, Fleet
from launching import read_metrics

from trainer.manifest import complete_checkpoints, verify

EXPECTED = {
    "killed": {-9, 1}, "killed in a save": {-9, 1}, "killed in a load": {-9, 1}, "stopped": {-9, 1},
    "SIGTERM": {0}, "SIGUSR1": {0}, "disk full": {2}, "not a number": {1}, "diverged": {1}, "clock": {0},
}  # fmt: skip


def curve(run: Path) -> list[float]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["train/loss"] for line in lines]


@pytest.fixture(scope="session")
def references(folder: Path) -> dict[tuple[int, str], list[float]]:
    """The curves of runs that nothing befell, made when asked for."""
    return {}


def reference(folder: Path, references: dict, ranks: int, *more: str) -> list[float]:
    key = (ranks, *more)
    if key not in references:
        name = f"reference-{len(references)}"
        assert set(Fleet(folder, name, ranks, *more).wait()) == {0}, (folder / f"{name}.stderr").read_text()
        references[key] = curve(folder / name)
    return references[key]


def go_through(
    folder: Path, references: dict, name: str, fault: tuple[int, str, int], ranks: int, *more: str
) -> str:
    """Let the fault happen, look at what is left, go on; return what the first run said."""
    _, kind, step = fault
    if kind == "killed in a load":
        stopped = Fleet(folder, name, ranks, *more, fault=(0, "SIGTERM", step))
        assert set(stopped.wait()) == {0}, stopped.log.read_text()
    fleet = Fleet(folder, name, ranks, *more, fault=fault)
    codes = fleet.wait()
    said = fleet.log.read_text()
    assert set(codes) <= EXPECTED[kind], said
    for path in complete_checkpoints(fleet.run / "checkpoints"):
        verify(path)
    if kind != "clock":
        assert not (fleet.run / "done.json").exists()
    again = Fleet(folder, name, ranks, *more)
    assert set(again.wait()) == {0}, again.log.read_text()
    assert curve(fleet.run) == reference(folder, references, ranks, *more)  # to the bit
    return said


def test_a_rank_killed_in_the_middle_of_a_save_loses_nothing(folder: Path, references: dict) -> None:
    fault = (1, "killed in a save", EVERY + 2)
    said = go_through(folder, references, "killed-in-save", fault, 2)
    assert "a rank is lost or hangs: " in said
    assert "rank 1 silent since step 6" in said
    assert (
        "it was left by a save that did not come to its end" in (folder / "killed-in-save.stderr").read_text()
    )
