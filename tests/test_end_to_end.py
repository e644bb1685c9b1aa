"""Whole runs through the real launchers, as a user starts them."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY, Started, options, read_metrics, start_train
from wandb_files import read_wandb

from trainer.manifest import complete_checkpoints, read_record


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """The run most tests look at: deepspeed on two ranks, W&B offline, a checkpoint on the way."""
    more = ("log.wandb=offline", "checkpoint.every_steps=12", "data.log_batch_digest=true")
    done = start_train(2, *options(folder, "two", *more)).wait()
    assert done.code == 0, done.stderr
    return folder / "two"


def losses(run: Path) -> torch.Tensor:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 31))
    return torch.tensor([line["train/loss"] for line in lines], dtype=torch.float64)


def test_deepspeed_on_two_ranks_learns_and_leaves_its_files(two_ranks: Path) -> None:
    loss = losses(two_ranks)
    assert loss[-5:].mean() < 0.5 * loss[:5].mean()
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "done.json", "figures/cosines-same.png"):
        assert (two_ranks / name).stat().st_size > 0, name
    assert [path.name for path in complete_checkpoints(two_ranks / "checkpoints")] == [
        "step-00000024",
        "step-00000030",
    ]
    log_text = (two_ranks / "log.txt").read_text()
    assert re.search(r"^  ranks +2 on cpu, 2 on this host$", log_text, re.MULTILINE)
    assert re.search(r"^  pixels +3 x 24 x 24, to which images are brought$", log_text, re.MULTILINE)
    last = read_metrics(two_ranks)[-1]
    assert sum(line["train/accuracy"] for line in read_metrics(two_ranks)[-5:]) / 5 > 0.8
    assert (
        json.loads((two_ranks / "done.json").read_text())["eval/same/accuracy"] == last["eval/same/accuracy"]
    )
    training = ("lr", "accuracy", "cosine_target", "cosine_nearest_other", "grad_norm")
    performance = ("images_per_second", "data_wait_fraction", "step_seconds", "memory_gib")
    assert last.keys() >= {f"train/{name}" for name in training} | {f"perf/{name}" for name in performance}


def test_offline_wandb_run_holds_the_same_metrics(two_ranks: Path) -> None:
    [file] = two_ranks.glob("wandb/offline-run-*/run-*.wandb")
    history = read_wandb(file)["history"]
    for line in read_metrics(two_ranks):
        assert history[line["step"]]["train/loss"] == line["train/loss"]


def test_a_scale_that_is_learned_is_shown_and_kept(folder: Path) -> None:
    changes = ("loss.name=normface", "optim.steps=6", "eval.classification={}")
    done = start_train(1, *options(folder, "normface", *changes)).wait()
    assert done.code == 0, done.stderr
    scales = [line["train/learned_scale"] for line in read_metrics(folder / "normface")]
    assert len(set(scales)) == 6
    [checkpoint] = complete_checkpoints(folder / "normface" / "checkpoints")
    assert read_record(checkpoint)["loss"] == {"learned_scale": scales[-1]}


def digests(run: Path) -> list[str]:
    return [line["data/batch_digest"] for line in read_metrics(run)]


@pytest.mark.parametrize(("ranks", "launcher"), [(1, "python"), (3, "torchrun")])
def test_curve_and_batches_do_not_depend_on_the_number_of_ranks(
    folder: Path, two_ranks: Path, ranks: int, launcher: str
) -> None:
    name = f"ranks{ranks}"
    arguments = options(folder, name, "data.log_batch_digest=true", "data.workers=0")
    done = start_train(ranks, *arguments, launcher=launcher).wait()
    assert done.code == 0, done.stderr
    # float32 sums in another order; 30 steps with momentum and batch norm let the differences grow
    torch.testing.assert_close(losses(folder / name), losses(two_ranks), rtol=1e-4, atol=0)
    assert digests(folder / name) == digests(two_ranks)
    assert len(set(digests(two_ranks))) == 30


def test_killed_run_goes_on_as_if_nothing_had_happened(folder: Path, two_ranks: Path) -> None:
    arguments = options(folder, "killed", "checkpoint.every_steps=12", "data.log_batch_digest=true")
    run = folder / "killed"
    started = start_train(2, *arguments)
    deadline = time.monotonic() + 120
    while not (complete_checkpoints(run / "checkpoints") and len(read_metrics(run)) > 12):
        assert time.monotonic() < deadline
        assert started.process.poll() is None
        time.sleep(0.05)
    started.kill()
    assert not (run / "done.json").exists()
    done = start_train(2, *arguments).wait()
    assert done.code == 0, done.stderr
    assert "resumed from" in done.stderr
    assert torch.equal(losses(run), losses(two_ranks))  # to the bit: same ranks, same machine
    assert digests(run) == digests(two_ranks)


def test_resume_on_another_number_of_ranks_follows_the_same_curve(folder: Path, two_ranks: Path) -> None:
    run = folder / "moved"
    shutil.copytree(two_ranks, run)
    shutil.rmtree(run / "checkpoints" / "step-00000030")
    done = start_train(
        1, *options(folder, "moved", "engine.zero_stage=1", "data.log_batch_digest=true")
    ).wait()
    assert done.code == 0, done.stderr
    torch.testing.assert_close(losses(run), losses(two_ranks), rtol=1e-4, atol=0)
    assert digests(run) == digests(two_ranks)


@pytest.mark.nightly
def test_a_run_killed_on_two_and_on_three_ranks_ends_on_one_with_the_same_batches(
    folder: Path, two_ranks: Path
) -> None:
    run = folder / "wandering"
    for ranks, workers, last_checkpoint in ((2, 1, 12), (3, 2, 24), (1, 0, None)):
        every = ("checkpoint.every_steps=12", "data.log_batch_digest=true", f"data.workers={workers}")
        started = start_train(ranks, *options(folder, "wandering", *every), launcher="torchrun")
        if last_checkpoint is None:
            done = started.wait()
            assert done.code == 0, done.stderr
            continue
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / f"step-{last_checkpoint:08d}").exists():
            assert time.monotonic() < deadline
            assert started.process.poll() is None
            time.sleep(0.02)
        started.kill()
    assert digests(run) == digests(two_ranks)
    torch.testing.assert_close(losses(run), losses(two_ranks), rtol=1e-4, atol=0)


def test_evaluate_gives_the_numbers_of_the_run(two_ranks: Path) -> None:
    done = Started(sys.executable, REPOSITORY / "launch" / "evaluate.py", two_ranks, "--json").wait()
    assert done.code == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["eval/same/accuracy"] == read_metrics(two_ranks)[-1]["eval/same/accuracy"]


def test_a_protocol_gives_the_numbers_of_the_run(two_ranks: Path, folder: Path) -> None:
    script = REPOSITORY / "launch" / "evaluate.py"
    options = ("--protocol", "closed_set", "--data", folder / "packed", "--json")
    done = Started(sys.executable, script, two_ranks, *options).wait()
    assert done.code == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    expected = read_metrics(two_ranks)[-1]["eval/same/nearest_centroid"]
    assert metrics["eval/closed_set/accuracy"] == pytest.approx(expected)
