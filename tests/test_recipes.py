"""The shipped recipes on their own data, cut short: from a fresh clone, by the commands of the README."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import BIN, OMNIGLOT, REPOSITORY, Finished, Started, free_port, read_metrics

pytestmark = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no git checkout to clone")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of the repository, in another place: nothing that lies about uncommitted can help."""
    path = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(path)], check=True)
    return path


def run(clone: Path, *command: str) -> Finished:
    """Run a command of the README in the clone; the environment, and two ranks on a free port, are given."""
    if command[0] == "deepspeed":
        command = (str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *command[1:])
    elif command[0] == "python":
        command = (sys.executable, *command[1:])
    finished = Started(*command, cwd=clone).wait()
    assert finished.code == 0, finished.stderr
    return finished


def test_demo_from_a_fresh_clone(clone: Path) -> None:
    run(clone, "python", "launch/pack.py", "mnist5k", "data/mnist")
    short = ("optim.epochs=null", "optim.steps=120", "log.every_steps=1", "log.wandb=disabled")
    run(clone, "deepspeed", "launch/train.py", "--config", "configs/demo.yaml", *short)
    lines = read_metrics(clone / "runs" / "demo")
    losses = [line["train/loss"] for line in lines]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert lines[-1]["eval/test/nearest_centroid"] > 0.3  # of ten classes, after an epoch

    twin = ("loss.name=softmax", "run.name=demo-softmax", "optim.epochs=null", "optim.steps=2")
    run(clone, "deepspeed", "launch/train.py", "--config", "configs/demo.yaml", *twin)
    table = run(clone, "python", "launch/evaluate.py", "runs/demo", "runs/demo-softmax").stdout
    assert "runs/demo-softmax" in table
    assert "nearest_centroid" in table
    assert (clone / "runs" / "demo" / "figures" / "features-test-compared.png").stat().st_size > 10_000


@pytest.mark.skipif(
    not OMNIGLOT.exists(), reason=f"Omniglot is not at {OMNIGLOT} (name its zip in OMNIGLOT_ZIP)"
)
@pytest.mark.nightly  # more than a minute on both cores
def test_omniglot_learns_to_tell_unseen_characters_apart(clone: Path) -> None:
    packed = run(
        clone, "python", "launch/pack.py", "omniglot", str(OMNIGLOT), "data/omniglot", "--json"
    ).stdout
    assert '"num_classes": 964' in packed
    assert '"num_classes": 659' in packed
    short = ("optim.epochs=null", "optim.steps=40", "backbone.image_size=24", "optim.warmup_steps=5")
    run(clone, "deepspeed", "launch/train.py", "--config", "configs/omniglot.yaml", *short)
    last = read_metrics(clone / "runs" / "omniglot")[-1]
    assert last["eval/unseen/auc"] > 0.7  # 0.5 is chance; the whole recipe: configs/omniglot.yaml
    assert last["eval/unseen/rank1"] > 20 / 659
