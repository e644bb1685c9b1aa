"""Studies: what is run, what is not run again, and the table against numpy and the t distribution."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import Started, make_data, options
from scipy.stats import t as t_distribution

from trainer.errors import UserError
from trainer.options import load
from trainer.study import (
    Study,
    command_of,
    load_study,
    results_of,
    run_study,
    runs_named,
    summary,
    write_table,
)

REPOSITORY = Path(__file__).parents[1]
STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
STUDY = """
base: base.yaml
common: {optim.lr: 0.5}
axes:
  loss: {coco: {}, softmax: {loss.name: softmax}, sum: {loss.name: triplet, loss.extra: {softmax: 0.5}}}
  dim: {2: {backbone.embedding_dim: 2}, 16: {backbone.embedding_dim: 16, optim.lr: 0.25}}
baseline: softmax
seeds: [3, 4, 5]
metrics: [eval/test/accuracy, eval/test/loss]
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("data: {train: none}\noptim: {steps: 1}\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return path


def accuracy(row: str, seed: int) -> float:
    return {"coco": 0.9, "softmax": 0.8, "sum": 0.7}[row.split("-")[0]] + math.sin(len(row) * seed) / 50


class Trainer:
    """Stands in for the training process: writes a result, or fails."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.seen = fails, []

    def __call__(self, command: Sequence[str], output: Path) -> int:
        name = next(part for part in command if part.startswith("run.name=")).partition("=")[2]
        self.seen.append(name)
        if name == self.fails:
            return 2
        row, _, seed = name.rpartition("-seed")
        values = {"eval/test/accuracy": accuracy(row, int(seed)), "eval/test/loss": 1.0}
        (output.parent / "done.json").write_text(json.dumps({"step": 1, **values}))
        return 0


def test_a_study_is_every_row_with_every_seed_as_a_command_that_stands_alone(path: Path) -> None:
    study = load_study(path, Path("runs"), ["optim.steps=7"])
    assert len(study.runs) == 3 * 2 * 3
    command = command_of(study, study.runs[-1])
    assert command[1:4] == [str(REPOSITORY / "launch" / "train.py"), "--config", "base.yaml"]
    config = load(Path("base.yaml"), command[4:])
    assert (config.loss.name, config.loss.extra) == ("triplet", {"softmax": 0.5})
    assert (config.backbone.embedding_dim, config.optim.lr, config.seed) == (16, 0.25, 5)
    assert (config.optim.steps, config.run_folder) == (7, Path("runs/tiny/sum-16-seed5"))
    assert load(Path("base.yaml"), command_of(study, study.runs[0])[4:]).optim.lr == 0.5


def test_what_is_finished_is_not_run_again_and_what_failed_is(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trainer")
    study = load_study(path, Path("runs"))
    failing = Trainer(fails="coco-16-seed4")
    failed = run_study(study, 2, failing)
    assert [run.folder.name for run in failed] == ["coco-16-seed4"]
    assert len(failing.seen) == 18
    again = Trainer()
    assert run_study(study, 1, again) == []
    assert again.seen == ["coco-16-seed4"]
    lines = caplog.text
    assert "begins coco-2-seed3; its lines: runs/tiny/coco-2-seed3/study.log" in lines
    assert "failed with code 2" in lines
    assert "; 18 of 18 ended, about 0:00:00 left" in lines
    assert "finished coco-16-seed4; 1 of 1 ended, about 0:00:00 left" in lines


TRAINS_UNTIL_TOLD = """
import pathlib, signal, sys, time
def stop(*_): pathlib.Path(sys.argv[1]).write_text("saved"); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("training")
time.sleep(30)
"""


def test_runs_are_chosen_by_name_and_the_table_has_those_before(path: Path) -> None:
    study, trainer = load_study(path, Path("runs")), Trainer()
    run_study(study, 1, trainer, ["coco-*-seed3"])
    run_study(study, 1, trainer, ["*-16-seed3"])
    assert trainer.seen == ["coco-2-seed3", "coco-16-seed3", "softmax-16-seed3", "sum-16-seed3"]
    assert "| coco-2 |" in Path("runs/tiny/table.md").read_text()
    chosen = runs_named(study, ["sum-2-*", "coco-2-seed4", "sum-*-seed5"])
    names = ["sum-2-seed3", "coco-2-seed4", "sum-2-seed4", "sum-2-seed5", "sum-16-seed5"]
    assert [run.folder.name for run in chosen] == names  # one seed after another, none twice
    with pytest.raises(UserError, match="--only: no run matches 'coco'; the first is coco-2-seed3"):
        run_study(study, 1, trainer, ["*-seed4", "coco"])
    assert len(trainer.seen) == 4


def test_a_study_told_to_stop_lets_the_run_in_hand_save_and_begins_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, state = load_study(path, Path("runs")), path.with_name("state")
    command = [sys.executable, "-c", TRAINS_UNTIL_TOLD, str(state)]

    def ask() -> None:
        while not state.exists() or state.read_text() != "training":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with monkeypatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        patch.setattr("trainer.study.command_of", lambda *_, **__: command)
        assert run_study(study) == []
    assert state.read_text() == "saved"
    assert [run.folder.exists() for run in study.runs] == [True] + [False] * 17
    first = json.loads((study.runs[0].folder / "study.json").read_text())["seconds"]
    again = Trainer()
    assert run_study(study, 1, again) == []
    assert len(again.seen) == 18
    assert results_of(study)[study.runs[0].row, 3]["seconds"] >= first > 0


def test_every_row_has_a_seed_before_the_next_seed_begins(path: Path) -> None:
    study = load_study(path, Path("runs"))
    assert [run.seed for run in study.runs] == [3] * 6 + [4] * 6 + [5] * 6
    assert len({run.row for run in study.runs[:6]}) == 6


def test_a_finished_run_with_other_settings_stops_the_study(path: Path) -> None:
    run_study(load_study(path, Path("runs")), 1, Trainer())
    other = Trainer()
    with pytest.raises(UserError, match=r"coco-2-seed3: was begun with other settings \(optim.lr\)"):
        run_study(load_study(path, Path("runs"), ["optim.lr=2"]), 1, other)
    assert other.seen == []


def test_a_recipe_edited_under_finished_runs_stops_the_study(path: Path) -> None:
    run_study(load_study(path, Path("runs")), 1, Trainer())
    path.with_name("base.yaml").write_text("data: {train: none}\noptim: {steps: 1, weight_decay: 0.75}\n")
    with pytest.raises(UserError, match=r"was begun with other settings \(optim.weight_decay\)"):
        run_study(load_study(path, Path("runs")), 1, Trainer())
    path.write_text(STUDY + "ranks: 2\n")
    path.with_name("base.yaml").write_text("data: {train: none}\noptim: {steps: 1}\n")
    with pytest.raises(UserError, match=r"was begun with other settings \(ranks\)"):
        run_study(load_study(path, Path("runs")), 1, Trainer())


def test_a_run_that_stopped_goes_on_with_its_own_settings_only(path: Path) -> None:
    stopped = Trainer(fails="coco-2-seed3")
    run_study(load_study(path, Path("runs")), 1, stopped, ["coco-2-seed3"])
    other = load_study(path, Path("runs"), ["optim.lr=2"])
    run_study(other, 1, stopped, ["coco-2-seed3"])  # nothing was trained: nothing to be mixed
    Path("runs/tiny/coco-2-seed3/checkpoints/step-00000001").mkdir(parents=True)
    assert len(run_study(other, 1, stopped, ["coco-2-seed3"])) == 1
    assert stopped.seen == ["coco-2-seed3"] * 3
    with pytest.raises(UserError, match=r"coco-2-seed3: was begun with other settings \(optim.lr\)"):
        run_study(load_study(path, Path("runs")), 1, stopped)
    assert len(stopped.seen) == 3


def test_runs_of_other_settings_are_not_in_the_table(path: Path) -> None:
    run_study(load_study(path, Path("runs")), 1, Trainer(), ["coco-*"])
    other = load_study(path, Path("runs"), ["optim.lr=2"])
    run_study(other, 1, Trainer(), ["softmax-2-*"])
    assert {row for row, _ in results_of(other)} == {("softmax", "2")}
    table = write_table(other).read_text()
    assert "| coco" not in table
    left_out = "Left out, for they had other settings: coco-2-seed3, coco-16-seed3, coco-2-seed4,"
    assert left_out in table


def test_differences_that_are_equal_but_for_rounding_have_no_p(path: Path) -> None:
    study = load_study(path, Path("runs"))
    values = {"coco": (0.9965, 0.9958, 0.9961), "softmax": (0.9955, 0.9948, 0.9951)}
    found = {
        ((loss, "2"), seed): {metric: float(np.float32(v)) for metric in (*study.metrics, "seconds")}
        for loss, of_seeds in values.items()
        for seed, v in zip((3, 4, 5), of_seeds, strict=True)
    }
    line = summary(study, found)[0]
    assert (line["row"], line["p"]) == ("coco-2", None)
    assert line["difference"] == pytest.approx(0.001, rel=1e-3)


def test_order_defaults_and_logging_mean_nothing_to_a_finished_run(path: Path) -> None:
    run_study(load_study(path, Path("runs"), ["optim.lr=2", "head.scale=3"]), 1, Trainer())
    other, same = Trainer(), ["optim.lr=9", "head.scale=3.0", "optim.lr=2", "seed=0", "log.wandb=disabled"]
    run_study(load_study(path, Path("runs"), same), 1, other)
    assert other.seen == []


def t_test(a: list[float], b: list[float]) -> float:
    """Return the p value of the paired two-sided t test, written out."""
    differences = np.subtract(a, b)
    t = differences.mean() / (differences.std(ddof=1) / len(differences) ** 0.5)
    return float(2 * t_distribution.sf(abs(t), len(differences) - 1))


def test_the_table_has_means_deviations_and_a_test_against_the_same_dimension(path: Path) -> None:
    study: Study = load_study(path, Path("runs"))
    run_study(study, 1, Trainer())
    lines = {line["row"]: line for line in summary(study, results_of(study))}
    for name, line in lines.items():
        loss, dim = name.split("-")
        own, base = ([accuracy(row, seed) for seed in (3, 4, 5)] for row in (name, f"softmax-{dim}"))
        assert line["n"] == 3
        assert line["eval/test/accuracy"] == pytest.approx(np.mean(own))
        assert line["eval/test/accuracy sd"] == pytest.approx(np.std(own, ddof=1))
        if loss == "softmax":
            assert line["p"] is None
        else:
            assert line["difference"] == pytest.approx(np.mean(own) - np.mean(base))
            assert line["p"] == pytest.approx(t_test(own, base))
    table = write_table(study).read_text()
    assert f"| coco-2 | 3 | {lines['coco-2']['eval/test/accuracy']:.5f} |" in table
    assert len((Path("runs/tiny") / "runs.csv").read_text().splitlines()) == 1 + 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: softmax", "baseline: none"), "baseline: 'none' is on no axis"),
        (("seeds: [3, 4, 5]", "seeds: [a]"), "seeds, ranks: must be whole numbers"),
        (("seeds: [3, 4, 5]", "seeds: [true]"), "seeds, ranks: must be whole numbers"),
        (("seeds: [3, 4, 5]", "seeds: [3, 4, 3]"), "axes, seeds: two runs have the name coco-2-seed3"),
        (("seeds: [3, 4, 5]", "seeds: [3, -1]"), "seed"),
        (("16: {", "a/b: {"), "run.name"),
        (("  dim:", "  none: {}\n  dim:"), "axes.none: must map each name"),
        (("[eval/test/accuracy, ", "[5, "), "metrics: must be names"),
        (("seeds: [3, 4, 5]", ""), "seeds: is required"),
        (("common:", "comon:"), "comon: unknown field"),
        (
            ("baseline:", "rows: {cocoa-*: {}}\nbaseline:"),
            "rows: no row matches 'cocoa-*'; the first is coco-2",
        ),
        (("baseline:", "rows: {coco-*: 5}\nbaseline:"), "rows.coco-*: must be section.field: value, got 5"),
        (("baseline:", "rows: {coco-*: {optim.lrr: 1}}\nbaseline:"), "optim.lrr: unknown field"),
        (("optim.lr: 0.25", "optim.lrr: 0.25"), "optim.lrr: unknown field; did you mean optim.lr"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_runs(
    path: Path, change: tuple[str, str], message: str
) -> None:
    path.write_text(STUDY.replace(*change))
    with pytest.raises(UserError) as caught:
        load_study(path, Path("runs"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_rows_change_what_their_axes_and_common_say(path: Path) -> None:
    path.write_text(STUDY + "rows: {'*-16': {optim.lr: 0.125}, softmax-16: {head.scale: 9}}\n")
    rates, scales = {}, {}
    for run in load_study(path, Path("runs")).runs:
        config = load(Path("base.yaml"), run.overrides)
        rates[run.row], scales[run.row] = config.optim.lr, config.head.scale
    assert {row[1]: rate for row, rate in rates.items()} == {"2": 0.5, "16": 0.125}
    assert [row for row, scale in scales.items() if scale == 9] == [("softmax", "16")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    study = load_study(path, Path("runs"))
    assert "launch/train.py" in command_of(study, study.runs[0])


REAL = """
base: {base}
axes: {{loss: {{coco: {{}}, softmax: {{loss.name: softmax}}}}}}
baseline: softmax
seeds: [0, 1]
metrics: [eval/same/accuracy]
"""


@pytest.mark.nightly  # six starts of training
def test_forked_runs_end_as_those_of_their_commands(tmp_path: Path) -> None:
    base, path = tmp_path / "base.yaml", tmp_path / "real.yaml"
    tree: dict[str, dict] = {}
    for text in options(make_data(tmp_path), "none", "optim.steps=3", "optim.warmup_steps=0"):
        field, _, value = text.partition("=")
        section, name = field.split(".", 1)
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    tree["eval"] = {"classification": {"same": tree["eval"]["classification.same"]}}
    base.write_text(yaml.safe_dump(tree))
    path.write_text(REAL.format(base=base))
    command = (sys.executable, "launch/study.py", path, "--json")
    finished = Started(*command, "--root", tmp_path / "forked").wait()
    assert finished.code == 0, finished.stderr
    assert [json.loads(line)["n"] for line in finished.stdout.splitlines()] == [2, 2]
    study = load_study(path, tmp_path / "alone")
    for run in study.runs[:2]:
        alone = Started(*command_of(study, run)).wait()
        assert alone.code == 0, alone.stderr
        forked = tmp_path / "forked" / "real" / run.folder.name
        assert (forked / "done.json").read_text() == (run.folder / "done.json").read_text()
