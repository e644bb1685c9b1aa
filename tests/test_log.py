import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from matplotlib.figure import Figure
from PIL import Image
from wandb_files import read_wandb

from trainer import log as log_module
from trainer.config import Config
from trainer.log import RunLog, Throughput, configure_logging, keep_lines_up_to, show_in_wandb
from trainer.options import load

REPOSITORY = Path(__file__).parents[1]
SECRET = "0123456789abcdef" * 2 + "01234567"  # of the length W&B expects of a key


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch) -> Iterator[None]:
    """Keep W&B out of the home folder, and put the logger back."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    before = log_module.log.handlers[:], log_module.log.propagate, log_module.log.level
    yield
    log_module.log.handlers[:], log_module.log.propagate = before[:2]
    log_module.log.setLevel(before[2])
    wandb.teardown()  # ends its process, which remembers keys and addresses


def make_config(root: Path, *overrides: str) -> Config:
    basis = ["data.train=shards", "optim.steps=10", "log.wandb=disabled", f"run.root={root}", "run.name=r"]
    return load(None, [*basis, *overrides])


def open_log(config: Config, start_step: int = 0, is_main: bool = True) -> RunLog:
    return RunLog(config, is_main=is_main, start_step=start_step)


def read_lines(config: Config) -> list[dict]:
    text = (config.run_folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


# metrics.jsonl


def test_a_step_is_one_line_with_what_was_added_since_the_last(tmp_path):
    config = make_config(tmp_path)
    with open_log(config) as run:
        run.add({"train/loss": torch.tensor(2.5), "train/lr": 0.1})
        run.add({"data/batch_digest": "00ff"})
        run.write(1)
        run.write(2)  # nothing was added: no line
        run.add({"train/loss": 1})
        run.write(3)
    assert read_lines(config) == [
        {"step": 1, "train/loss": 2.5, "train/lr": 0.1, "data/batch_digest": "00ff"},
        {"step": 3, "train/loss": 1},
    ]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    """A kill between two steps loses nothing."""
    config = make_config(tmp_path)
    with open_log(config) as run:
        for step in (1, 2):
            run.add({"train/loss": 0.5})
            run.write(step)
            assert len(read_lines(config)) == step


def test_numbers_keep_every_bit(tmp_path):
    config = make_config(tmp_path)
    random = np.random.default_rng(0)
    singles = torch.from_numpy(random.standard_normal(200, dtype=np.float32)).mul_(1e-3)
    doubles = [float(x) for x in random.standard_normal(200) * 1e10]
    with open_log(config) as run:
        for step, (single, double) in enumerate(zip(singles, doubles, strict=True), 1):
            run.add({"train/loss": single, "train/lr": double})
            run.write(step)
    lines = read_lines(config)
    assert [line["train/lr"] for line in lines] == doubles
    read_back = np.array([line["train/loss"] for line in lines])
    assert np.array_equal(read_back.astype(np.float32), singles.numpy())
    assert np.array_equal(read_back, singles.double().numpy())


@pytest.mark.parametrize("step", [0, 3, 5, 99])
def test_lines_of_later_steps_are_dropped(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "train/loss": 1 / s}) + "\n" for s in range(1, 6)]
    path.write_text("".join(lines))
    keep_lines_up_to(path, step)
    assert path.read_text() == "".join(lines[:step])
    assert list(tmp_path.iterdir()) == [path]


def test_a_last_line_cut_short_anywhere_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole, last = '{"step": 1, "train/loss": 0.5}\n', '{"step": 2, "train/loss": 0.25}'
    for length in range(len(last)):
        path.write_text(whole + last[:length])
        keep_lines_up_to(path, 5)
        assert path.read_text() == whole, last[:length]
    path.write_text(whole + last)  # only the line break is missing
    keep_lines_up_to(path, 5)
    assert path.read_text() == whole + last + "\n"


def test_a_missing_file_stays_missing(tmp_path):
    keep_lines_up_to(tmp_path / "metrics.jsonl", 5)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_has_every_step_once(tmp_path):
    config = make_config(tmp_path)

    def write(run: RunLog, steps: range, loss: float) -> None:
        for step in steps:
            run.add({"train/loss": loss})
            run.write(step)

    with open_log(config) as run:
        write(run, range(1, 9), 1.0)
    with (config.run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/lo')
    with open_log(config, start_step=5) as run:  # the newest checkpoint was of step 5
        write(run, range(6, 11), 2.0)
    assert [(line["step"], line["train/loss"]) for line in read_lines(config)] == [
        (step, 1.0 if step <= 5 else 2.0) for step in range(1, 11)
    ]


# The folder


def test_a_disabled_wandb_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("W&B was started"))
    config = make_config(tmp_path)
    with open_log(config) as run:
        run.add({"train/loss": 1.0})
        run.write(1)
        run.finish(10, {"eval/test/accuracy": 0.5})
    assert sorted(p.name for p in config.run_folder.iterdir()) == [
        "config.yaml",
        "done.json",
        "metrics.jsonl",
    ]


def test_the_resolved_configuration_repeats_the_run(tmp_path):
    config = make_config(tmp_path, "optim.lr=0.3")
    with open_log(config):
        pass
    assert load(config.run_folder / "config.yaml") == config


def test_the_completion_marker_is_there_only_after_a_whole_run(tmp_path):
    config = make_config(tmp_path)
    marker = config.run_folder / "done.json"
    with open_log(config) as run:
        assert not marker.exists()
        run.finish(10, {"eval/test/accuracy": 0.5})
    assert json.loads(marker.read_text()) == {"step": 10, "eval/test/accuracy": 0.5}
    with open_log(config):  # started again: not whole until it says so
        assert not marker.exists()


def test_other_ranks_write_nothing(tmp_path):
    config = make_config(tmp_path, "log.wandb=offline")
    with open_log(config, is_main=False) as run:
        run.sheet("text")
        run.add({"train/loss": torch.tensor(1.0)})
        run.write(1)
        run.figure("roc", Figure(), 1)
        run.finish(1, {})
    assert not list(tmp_path.iterdir())


def test_a_figure_is_a_picture_in_the_folder(tmp_path):
    config = make_config(tmp_path)
    with open_log(config) as run:
        run.figure("roc", Figure(), 10)
    assert (config.run_folder / "figures" / "roc.png").read_bytes().startswith(b"\x89PNG")


# What is due, and how fast


def test_something_is_due_at_its_multiples_and_at_the_end(tmp_path):
    run = open_log(make_config(tmp_path))
    assert [step for step in range(1, 11) if run.is_due(step, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if run.is_due(step, None)] == [10]


def test_throughput_counts_what_lies_between_two_readings(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: clock[0])
    throughput = Throughput(global_batch=64)
    for _ in range(4):
        with throughput.waiting():
            clock[0] += 0.25
    clock[0] = 102.0
    assert throughput.read() == {
        "perf/images_per_second": 4 * 64 / 2.0,
        "perf/step_seconds": 2.0 / 4,
        "perf/data_wait_fraction": 4 * 0.25 / 2.0,
    }
    with throughput.waiting():
        pass
    clock[0] = 104.0
    assert throughput.read()["perf/images_per_second"] == 32.0


# Console


def test_rank_0_tells_all_on_stderr_and_in_the_folder(tmp_path, capsys):
    configure_logging(tmp_path / "r", rank=0)
    with open_log(make_config(tmp_path)) as run:
        run.add({"train/loss": 0.123456, "data/batch_digest": "00ff"})
        run.write(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("step 3/10  loss 0.1235\n")
    assert (tmp_path / "r" / "log.txt").read_text() == err


def test_other_ranks_only_warn_and_say_who_they_are(tmp_path, capsys):
    configure_logging(tmp_path / "r", rank=3)
    log_module.log.info("not shown")
    kept = tmp_path / "r" / "log-rank-00003.txt"
    assert not kept.exists()
    log_module.log.warning("look here")
    assert capsys.readouterr().err == kept.read_text() == "[rank 3] look here\n"


def test_logging_configured_twice_speaks_once(capsys):
    configure_logging(None, rank=0)
    configure_logging(None, rank=0)
    log_module.log.info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_a_progress_bar_takes_the_place_of_the_lines_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open_log(make_config(tmp_path)) as run:
        run.sheet("the sheet")
        run.add({"eval/test/accuracy": 0.5})  # a line without a loss
        run.write(4)
        run.add({"train/loss": 0.25, "perf/images_per_second": 1234.0})
        run.write(5)
    assert "step 5/10" in terminal.getvalue()
    assert "loss 0.2500  1234 images/s" in terminal.getvalue()


# W&B


def _written_runs(folder: Path) -> list[dict]:
    """Return what W&B's files say, in their order; its service ends them after its client has finished."""
    begin = time.monotonic()
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns)
        told = [read_wandb(path) for path in paths]
        if all("exit" in run for run in told):
            return told
        assert time.monotonic() - begin < 20
        time.sleep(0.05)


def test_wandb_offline_holds_the_metrics_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config = make_config(tmp_path, "log.wandb=offline", "log.wandb_project=faces")
    losses = {1: 2.5, 2: 1 / 3, 3: 0.1}
    with open_log(config) as run:
        for step, loss in losses.items():
            run.add({"train/loss": loss, "eval/test/tar@far=1e-3": loss / 2})
            run.write(step)
        run.figure("roc", Figure(), 3)
        (config.run_folder / "report.html").write_text("<!doctype html><p>all of it</p>")
        run.page(config.run_folder / "report.html", 3)
    with contextlib.suppress(ZeroDivisionError), open_log(config, start_step=2) as run:
        run.add({"train/loss": 0.25})
        run.write(3)
        raise ZeroDivisionError
    gif = config.run_folder / "figures" / "features-test.gif"
    Image.new("P", (8, 8)).save(gif, save_all=True, append_images=[Image.new("P", (8, 8), 1)])
    show_in_wandb(config.run_folder, [gif, config.run_folder / "figures" / "roc.png"])
    whole, failed, drawn = _written_runs(config.run_folder)
    assert drawn["id"] == whole["id"]
    assert drawn["history"][3]["figures/features-test/_type"] == "video-file"
    assert drawn["history"][3]["figures/roc/_type"] == "image-file"
    assert (whole["exit"], failed["exit"]) == (0, 1)
    assert (whole["project"], whole["name"]) == ("faces", "r")
    assert whole["id"] == failed["id"] == (config.run_folder / "wandb" / "id").read_text()
    assert whole["config"]["optim"]["steps"] == 10
    for step, loss in losses.items():
        assert whole["history"][step]["train/loss"] == loss
        assert whole["history"][step]["eval/test/tar@far=1e-3"] == loss / 2
    assert any(name.startswith("figures/roc") for name in whole["history"][3])
    [page] = (config.run_folder / "wandb").glob("offline-run-*/files/media/html/report_*.html")
    assert "<p>all of it</p>" in page.read_text()
    assert failed["history"][3]["train/loss"] == 0.25
    for path in config.run_folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_wandb_online_without_network_warns_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port "discard": nobody listens
    asked: dict = {}
    real = wandb.Settings

    def impatient(**settings) -> wandb.Settings:
        asked.update(settings)
        return real(**{**settings, "init_timeout": 2})

    monkeypatch.setattr(wandb, "Settings", impatient)
    config = make_config(tmp_path, "log.wandb=online")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "trainer"), open_log(config) as run:
        run.add({"train/loss": 1.0})
        run.write(1)
    assert time.monotonic() - started < 15.0  # 2 s of patience and the start of W&B's own process
    assert asked["init_timeout"] <= 30  # W&B's default is 90
    assert [line["step"] for line in read_lines(config)] == [1]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("W&B is not available, going on without it: ")
    assert "\n" not in warning
    assert "127.0.0.1:9" in warning  # nobody else was asked
    assert SECRET not in warning


def test_wandb_online_without_a_key_asks_nobody_even_on_a_terminal(tmp_path):
    """W&B would ask for a key and wait for ever, and with it all other ranks."""
    program = f"""
from pathlib import Path
from trainer.log import RunLog, configure_logging
from trainer.options import load
fields = ["data.train=a", "optim.steps=1", "log.wandb=online", "run.root={tmp_path}", "run.name=r"]
config = load(None, fields)
configure_logging(config.run_folder, 0)
with RunLog(config, is_main=True, start_step=0) as run:
    run.add({{"train/loss": 1.0}})
    run.write(1)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "TERM": "xterm"}
    ours, theirs = pty.openpty()  # stays open: nobody answers, nobody hangs up
    try:
        arguments = [sys.executable, "-c", program]
        terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        subprocess.run(arguments, cwd=REPOSITORY, env=environment, **terminal, check=True, timeout=40)
    finally:
        os.close(theirs)
        os.close(ours)
    text = (tmp_path / "r" / "log.txt").read_text()
    assert "W&B is not available, going on without it: No API key configured." in text
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 1.0}\n'


def test_a_wandb_that_breaks_later_costs_warnings_only(tmp_path, monkeypatch, caplog):
    class Broken:
        def log(self, *_, **__) -> None:
            raise ConnectionError("gone\naway")

        def finish(self, **_) -> None:
            raise ConnectionError("gone\naway")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    config = make_config(tmp_path, "log.wandb=offline")
    with caplog.at_level(logging.WARNING, "trainer"), open_log(config) as run:
        run.add({"train/loss": 1.0})
        run.write(1)
    assert [line["step"] for line in read_lines(config)] == [1]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == ["W&B: gone away"] * 2
