"""Studies: one recipe, many rows and seeds; what is missing is run, and one table tells how they compare.

A study is a YAML file::

    base: configs/mnist.yaml        # the recipe
    common: {optim.epochs: 10}      # changes to it for every row; optional
    axes:                           # a row is one value of each axis, named by all of them: coco-d2
      loss: {coco: {loss.name: coco}, softmax: {loss.name: softmax}}
      dim: {d2: {backbone.embedding_dim: 2}, d128: {backbone.embedding_dim: 128}}
    rows: {coco-*: {optim.lr: 0.2}} # changes to the rows whose names fit; optional
    baseline: softmax               # rows are tested against the row with this value in place of their own
    seeds: [0, 1, 2]
    metrics: [eval/test/accuracy]   # the first is tested
    ranks: 1                        # above 1 by DeepSpeed's launcher; optional

Runs live in ``<root>/<study>/<row>-seed<n>``; one with a done.json is finished and never run again. What it
was begun with is kept beside it: other settings neither go on with it nor stand in one table with it. All
rows have a seed before the next one begins: the table compares them whenever a study is stopped.
"""

import csv
import fnmatch
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import runpy
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from trainer.config import Config, to_dict
from trainer.errors import UserError
from trainer.options import changed_since, load, read_yaml
from trainer.signals import StopRequest

log = logging.getLogger("trainer")

_REQUIRED = {"base": str, "axes": dict, "seeds": list, "metrics": list}
_OPTIONAL = {"common": dict, "rows": dict, "baseline": str, "ranks": int}
_FIRST_PORT = 29600
_REPOSITORY = Path(__file__).resolve().parents[1]
_server = multiprocessing.get_context("forkserver")

Results = Mapping[tuple[tuple[str, ...], int], Mapping[str, float]]

Execute = Callable[[Sequence[str], Path], int]
"""(command, file of its output) -> exit code."""


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: tuple[str, ...]
    """Its value on each axis."""
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    """``section.field=value``, all that differs from the recipe but the folder."""
    config: Config
    """What these make of the recipe."""


@dataclass(frozen=True)
class Study:
    """A study file, checked."""

    name: str
    command: str
    """What repeats it."""
    base: Path
    axes: Mapping[str, Mapping[str, Any]]
    baseline: str | None
    metrics: tuple[str, ...]
    ranks: int
    runs: tuple[Run, ...]


def load_study(path: Path, root: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study; ``overrides`` come last in every row. Raises UserError."""
    tree = _read(path)
    axes, base = tree["axes"], Path(tree["base"])
    runs: dict[str, Run] = {}
    for seed, row in itertools.product(tree["seeds"], itertools.product(*axes.values())):
        changes, name = _changes_of(tree, row), f"{_row_name(row)}-seed{seed}"
        texts = [f"{field}={json.dumps(value, default=str)}" for field, value in changes.items()]
        if name in runs:
            raise UserError(f"{path}: axes, seeds: two runs have the name {name}")
        texts += [*overrides, f"seed={seed}"]
        try:  # a typo in the last row is met now
            config = load(base, (*texts, f"run.name={name}"))
        except UserError as error:
            raise UserError(f"{path}: {_row_name(row)}: {error}") from None
        runs[name] = Run(tuple(map(str, row)), seed, root / path.stem / name, tuple(texts), config)
    return Study(
        name=path.stem,
        command=shlex.join(["python", "launch/study.py", str(path), *overrides]),
        base=base,
        axes=axes,
        baseline=tree.get("baseline"),
        metrics=tuple(tree["metrics"]),
        ranks=tree.get("ranks", 1),
        runs=tuple(runs.values()),
    )


def _row_name(row: Sequence[Any]) -> str:
    return "-".join(map(str, row))


def _changes_of(tree: Mapping[str, Any], row: Sequence[Any]) -> dict[str, Any]:
    """Return what a row changes of the recipe; of two values for a field the later section's counts."""
    changes = dict(tree.get("common", {}))
    for values, value in zip(tree["axes"].values(), row, strict=True):
        changes |= values[value]
    for pattern, own in tree.get("rows", {}).items():
        if fnmatch.fnmatchcase(_row_name(row), str(pattern)):
            changes |= own
    return changes


def _read(path: Path) -> dict[str, Any]:
    """Return the fields of a study file. Raises UserError for what no study can have."""
    tree = read_yaml(path)
    kinds = {**_REQUIRED, **_OPTIONAL}
    for name, value in tree.items():
        if name not in kinds:
            raise UserError(f"{path}: {name}: unknown field; a study has {', '.join(kinds)}")
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise UserError(f"{path}: {name}: must be a {kinds[name].__name__}, got {value!r}")
    if missing := [name for name in _REQUIRED if not tree.get(name)]:
        raise UserError(f"{path}: {missing[0]}: is required")
    axes, baseline = tree["axes"], tree.get("baseline")
    for axis, values in axes.items():
        if not (values and isinstance(values, dict) and all(isinstance(v, dict) for v in values.values())):
            raise UserError(f"{path}: axes.{axis}: must map each name to section.field: value")
    names = [_row_name(row) for row in itertools.product(*axes.values())]
    for pattern, changes in tree.get("rows", {}).items():
        if not isinstance(changes, dict):
            raise UserError(f"{path}: rows.{pattern}: must be section.field: value, got {changes!r}")
        if not fnmatch.filter(names, str(pattern)):
            raise UserError(f"{path}: rows: no row matches {pattern!r}; the first is {names[0]}")
    if baseline is not None and not any(baseline in map(str, values) for values in axes.values()):
        raise UserError(f"{path}: baseline: {baseline!r} is on no axis")
    if not all(type(seed) is int for seed in tree["seeds"]) or tree.get("ranks", 1) < 1:
        raise UserError(f"{path}: seeds, ranks: must be whole numbers, ranks at least 1")
    if not all(isinstance(metric, str) for metric in tree["metrics"]):
        raise UserError(f"{path}: metrics: must be names such as eval/test/accuracy, got {tree['metrics']}")
    return tree


def run_study(
    study: Study, parallel: int = 1, execute: Execute | None = None, only: Sequence[str] = ("*",)
) -> list[Run]:
    """Run what is not finished, ``parallel`` at a time, and write the table after each; return what failed.

    ``only``: see ``runs_named``; the table has all that are finished. Told to stop by a signal it lets the
    runs in hand save and begins no other. Raises UserError, before anything runs, for a run that was begun
    with other settings. Main thread only.
    """
    chosen = runs_named(study, only)
    waiting = [run for run in chosen if not _is_finished(run, study)]
    log.info("study %s: %d of %d runs to do", study.name, len(waiting), len(chosen))
    one_at_a_time, ended, start = threading.Lock(), itertools.count(1), time.monotonic()

    def do(numbered: tuple[int, Run]) -> Run | None:
        number, run = numbered
        if stop.is_asked:
            return None
        _keep_record(run, study, _record(run).get("seconds"))
        command, began = command_of(study, run, port=_FIRST_PORT + number % 1000), time.monotonic()
        log.info("begins %s; its lines: %s", run.folder.name, run.folder / "study.log")
        code = (execute or partial(_choose_execute(study), stop))(command, run.folder / "study.log")
        seconds = (_record(run).get("seconds") or 0.0) + time.monotonic() - began
        _keep_record(run, study, round(seconds, 1))
        count, took = next(ended), time.monotonic() - start
        left = timedelta(seconds=round(took / count * (len(waiting) - count)))
        is_finished = not code and (run.folder / "done.json").exists()
        if stop.is_asked and not is_finished:
            log.info("told to stop; the same command goes on with %s", run.folder)
            return None
        if not is_finished:
            log.error("failed with code %d: %s; see %s", code, shlex.join(command), run.folder / "study.log")
            return run
        with one_at_a_time:
            write_table(study)
        log.info("finished %s; %d of %d ended, about %s left", run.folder.name, count, len(waiting), left)
        return None

    with StopRequest() as stop, ThreadPoolExecutor(parallel) as pool:
        failed = [run for run in pool.map(do, enumerate(waiting)) if run is not None]
    write_table(study)
    return failed


def runs_named(study: Study, patterns: Sequence[str]) -> list[Run]:
    """Return the runs whose names fit any of the shell's patterns, ``mnist-*-seed0``, in the study's order.

    Raises UserError for a pattern that none fits.
    """
    names = [run.folder.name for run in study.runs]
    fitting = {pattern: set(fnmatch.filter(names, pattern)) for pattern in patterns}
    for pattern, found in fitting.items():
        if not found:
            raise UserError(f"--only: no run matches {pattern!r}; the first is {names[0]}")
    chosen = set().union(*fitting.values())
    return [run for run in study.runs if run.folder.name in chosen]


def command_of(study: Study, run: Run, port: int = _FIRST_PORT) -> list[str]:
    """Return the command of one run: it repeats that row by itself, too."""
    launcher = [sys.executable]
    if study.ranks > 1:
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        launcher = [deepspeed, "--num_gpus", str(study.ranks), "--master_port", str(port)]
    place = (f"run.root={run.folder.parent}", f"run.name={run.folder.name}")
    script = _REPOSITORY / "launch" / "train.py"
    if Path.cwd() == _REPOSITORY:  # as people type it
        script = script.relative_to(_REPOSITORY)
    return [*launcher, str(script), "--config", str(study.base), *run.overrides, *place]


def write_table(study: Study) -> Path:
    """Write ``runs.csv`` (a line per finished run), ``table.csv`` and ``table.md``; return the last."""
    folder = study.runs[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    found = results_of(study)
    per_run = [{"row": _row_name(row), "seed": seed, **values} for (row, seed), values in found.items()]
    _write_csv(folder / "runs.csv", ["row", "seed", *study.metrics, "seconds"], per_run)
    lines = summary(study, found)
    columns = list(lines[0]) if lines else ["row"]
    _write_csv(folder / "table.csv", columns, lines)
    cells = [columns, ["---"] * len(columns), *([_shown(line[c]) for c in columns] for line in lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    versus = f"; p: paired t test over seeds against {study.baseline}" if study.baseline else ""
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    what = f"`{study.command}` (`--commands` prints each run's), {study.ranks} rank(s) on {machine}{versus}."
    others = [run.folder.name for run in study.runs if _is_done(run) and _differences(run, study)]
    if others:
        what += f" Left out, for they had other settings: {', '.join(others)}."
    header = f"# {study.name}\n\n{what}\n\n"
    path = folder / "table.md"
    path.write_text(header + text + "\n")
    return path


def results_of(study: Study) -> Results:
    """Return (row, seed) -> metrics and seconds of every run that was finished with the study's settings."""
    return {(run.row, run.seed): values for run in study.runs if (values := _results(run, study))}


def summary(study: Study, found: Results) -> list[dict]:
    """Return a line for each row that has results: n, mean and deviation of every metric, and the test.

    The test pairs the seeds that both rows have finished; with fewer than two, or no difference at all, it
    says nothing and is left out (None).
    """
    lines = []
    for row in dict.fromkeys(run.row for run in study.runs):
        own = {seed: values for (of, seed), values in found.items() if of == row}
        if not own:
            continue
        line: dict[str, Any] = {"row": _row_name(row), "n": len(own)}
        for metric in (*study.metrics, "seconds"):
            values = [run[metric] for run in own.values()]
            line[metric] = statistics.fmean(values)
            if metric != "seconds":
                line[f"{metric} sd"] = statistics.stdev(values) if len(values) > 1 else None
        if study.baseline is not None:
            other = _baseline_of(study, row)
            pairs = [
                (values[study.metrics[0]], found[other, seed][study.metrics[0]])
                for seed, values in own.items()
                if (other, seed) in found and other != row
            ]
            line["difference"] = statistics.fmean(a - b for a, b in pairs) if pairs else None
            line["p"] = _p_value(pairs)
        lines.append(line)
    return lines


def _baseline_of(study: Study, row: tuple[str, ...]) -> tuple[str, ...]:
    """Return the row with the baseline in place of its own value on that axis."""
    return tuple(
        str(study.baseline) if study.baseline in [str(value) for value in values] else name
        for values, name in zip(study.axes.values(), row, strict=True)
    )


def _p_value(pairs: Sequence[tuple[float, float]]) -> float | None:
    differences = [a - b for a, b in pairs]
    rounding = 1e-6 * max((abs(value) for pair in pairs for value in pair), default=0.0)
    if len(pairs) < 2 or statistics.stdev(differences) <= rounding:
        return None  # equal differences: their float32 rounding is not a spread
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return p if math.isfinite(p) else None


def _is_done(run: Run) -> bool:
    return (run.folder / "done.json").exists()


def _is_finished(run: Run, study: Study) -> bool:
    if other := _differences(run, study):
        raise UserError(
            f"{run.folder}: was begun with other settings ({', '.join(other)}); remove it, or rename row or "
            "study"
        )
    # One that ended before its time was recorded goes on from its last checkpoint, the end.
    return _is_done(run) and _record(run).get("seconds") is not None


def _differences(run: Run, study: Study) -> list[str]:
    """Return the fields in which a run has trained with other values than the study has now."""
    has_trained = _is_done(run) or any((run.folder / "checkpoints").glob("step-*"))
    if not (has_trained and (record := _record(run))):
        return []
    changed = changed_since(record["settings"], run.config)
    other = [name for name in changed if name.split(".")[0] not in ("run", "log")]
    return other + (["ranks"] if record["ranks"] != study.ranks else [])


def _record(run: Run) -> dict[str, Any]:
    """Return what the run was begun with, and the seconds of its attempts that ended; nothing if unknown."""
    try:
        record = json.loads((run.folder / "study.json").read_text())
        return {name: record[name] for name in ("settings", "ranks", "seconds")}
    except (OSError, ValueError, KeyError):
        return {}


def _keep_record(run: Run, study: Study, seconds: float | None) -> None:
    record = {"settings": to_dict(run.config), "ranks": study.ranks, "seconds": seconds}
    run.folder.mkdir(parents=True, exist_ok=True)
    new = run.folder / "study.json.new"
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(run.folder / "study.json")


def _results(run: Run, study: Study) -> dict[str, float]:
    """Return the metrics of a finished run, else nothing. Raises UserError for one that it does not have."""
    try:
        done = json.loads((run.folder / "done.json").read_text())
    except (OSError, ValueError):
        return {}
    seconds = _record(run).get("seconds")
    if seconds is None or _differences(run, study):
        return {}
    for metric in study.metrics:
        if metric not in done:
            raise UserError(f"metrics: {run.folder} has no {metric}; it has {', '.join(done)}")
    return {metric: float(done[metric]) for metric in study.metrics} | {"seconds": seconds}


def _execute(stop: StopRequest, command: Sequence[str], output: Path) -> int:
    """Run the command to its end; pass on, once, the request to stop."""
    with output.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and not stop.is_asked:
            time.sleep(0.2)
        if process.poll() is None:
            process.terminate()
        return process.wait()


def _execute_forked(stop: StopRequest, command: Sequence[str], output: Path) -> int:
    """The same for one process on CPU, forked from a server that has imported everything: 10 s less a run."""
    process = _server.Process(target=_run_script, args=(command[1:], output))
    process.start()
    while process.is_alive() and not stop.is_asked:
        process.join(0.2)
    if process.is_alive():
        process.terminate()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_script(arguments: Sequence[str], output: Path) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [*arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _choose_execute(study: Study) -> Callable[[StopRequest, Sequence[str], Path], int]:
    """Return how runs are executed here. A fork may not follow a look at a GPU."""
    if study.ranks > 1 or os.environ.get("DS_ACCELERATOR") != "cpu":
        return _execute
    # What DeepSpeed imports last is torch's compiler, when it meets an optimizer.
    _server.set_forkserver_preload(
        ["trainer.loop", "trainer.study", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    return _execute_forked


def _write_csv(path: Path, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 10 else f"{value:.5f}"
    return "" if value is None else str(value)
