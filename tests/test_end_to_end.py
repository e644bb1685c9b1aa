"""Whole runs through the real launchers, as a user starts them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.launching import REPOSITORY, Started, read_metrics, start_train
from trainer.checkpoint import complete_checkpoints

CLASSES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of noisy 20 x 20 patterns, packed by the real command."""
    root = tmp_path_factory.mktemp("end-to-end")
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        pattern = generator.integers(0, 200, (20, 20, 3))
        for i in range(12):
            image = np.clip(pattern + generator.integers(0, 56, (20, 20, 3)), 0, 255).astype(np.uint8)
            path = root / "images" / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    pack = Started(
        sys.executable, "launch/pack.py", "imagefolder", root / "images", root / "packed", "--json"
    ).wait()
    assert pack.code == 0, pack.stderr
    return root


def options(folder: Path, name: str, *more: str) -> list[str]:
    """A small network with batch norm, so that statistics over ranks are tried too."""
    return [
        f"data.train={folder / 'packed'}", "data.batch_size=12", "data.workers=1",
        "backbone.name=resnet10t", "backbone.image_size=24", "backbone.embedding_dim=16",
        "optim.lr=0.02", "optim.steps=30", "optim.warmup_steps=3", "optim.clip_norm=5", "augment.flip=0.5",
        "engine.dtype=float32", "log.every_steps=1", "log.wandb=disabled", f"run.root={folder}",
        f"run.name={name}", f"eval.classification.same={folder / 'packed'}", *more,
    ]  # fmt: skip


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
    last = read_metrics(two_ranks)[-1]
    assert last["eval/same/accuracy"] > 0.8
    assert (
        json.loads((two_ranks / "done.json").read_text())["eval/same/accuracy"] == last["eval/same/accuracy"]
    )
    training = ("lr", "accuracy", "cosine_target", "cosine_nearest_other", "grad_norm")
    performance = ("images_per_second", "data_wait_fraction", "step_seconds", "memory_gib")
    assert last.keys() >= {f"train/{name}" for name in training} | {f"perf/{name}" for name in performance}


def test_offline_wandb_run_holds_the_same_metrics(two_ranks: Path) -> None:
    from tests.test_log import read_wandb_history

    [file] = two_ranks.glob("wandb/offline-run-*/run-*.wandb")
    history = {line["_step"]: line for line in read_wandb_history(file) if "train/loss" in line}
    for line in read_metrics(two_ranks):
        assert history[line["step"]]["train/loss"] == line["train/loss"]


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
    digests = [
        [line["data/batch_digest"] for line in read_metrics(run)] for run in (folder / name, two_ranks)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 30


def test_killed_run_goes_on_as_if_nothing_had_happened(folder: Path, two_ranks: Path) -> None:
    import time

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


def test_resume_on_another_number_of_ranks_follows_the_same_curve(folder: Path, two_ranks: Path) -> None:
    import shutil

    run = folder / "moved"
    shutil.copytree(two_ranks, run)
    shutil.rmtree(run / "checkpoints" / "step-00000030")
    done = start_train(
        1, *options(folder, "moved", "engine.zero_stage=1", "data.log_batch_digest=true")
    ).wait()
    assert done.code == 0, done.stderr
    torch.testing.assert_close(losses(run), losses(two_ranks), rtol=1e-4, atol=0)


def test_evaluate_gives_the_numbers_of_the_run(two_ranks: Path) -> None:
    done = Started(sys.executable, REPOSITORY / "launch" / "evaluate.py", two_ranks, "--json").wait()
    assert done.code == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["eval/same/accuracy"] == read_metrics(two_ranks)[-1]["eval/same/accuracy"]
