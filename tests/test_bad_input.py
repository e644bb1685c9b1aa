"""What a user can get wrong: one line that names the field or file, exit code 2, nothing else."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, Finished, Started, options, start_train

CASES = {
    "typo": (["optim.lrr=0.1"], "optim.lrr: unknown field; did you mean optim.lr?"),
    "type": (["optim.lr=fast"], "optim.lr: input should be a valid number"),
    "no-data": (["data.train=/nowhere/at/all"], "data.train: /nowhere/at/all does not exist"),
    "label": (["head.num_classes=5"], "head.num_classes: is 5, but data.train has label 6"),
    "backbone": (["backbone.name=resnet10x"], "timm has no model 'resnet10x'; did you mean resnet10t?"),
    "batch": (["data.batch_size=13", "engine.accumulation_steps=2"], "data.batch_size: 13 is not divisible"),
    "override": (["engine.deepspeed_overrides.gradient_cliping=1"], "overrides.gradient_cliping: not a key"),
    "checkpoint": (["checkpoint.resume=/nowhere"], "/nowhere: not a checkpoint"),
    "float16": (["engine.dtype=float16"], "engine.zero_stage: float16 needs 1 or 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Finished]:
    """Run all cases side by side: what costs time is importing torch."""
    started = {}
    for name, (overrides, _) in CASES.items():
        started[name] = start_train(1, *options(folder, f"bad-{name}", *overrides))
    return {name: process.wait() for name, process in started.items()}


@pytest.mark.parametrize("case", CASES)
def test_is_one_line_and_exit_code_2(outcomes: dict[str, Finished], case: str) -> None:
    finished = outcomes[case]
    assert finished.code == 2, finished.stderr
    assert len(finished.errors) == 1, finished.stderr
    assert CASES[case][1] in finished.errors[0]
    assert "Traceback" not in finished.stderr


def test_more_ranks_than_classes_is_refused_by_all_ranks(folder: Path) -> None:
    arguments = options(folder, "bad-ranks", "log.wandb=disabled")
    few = folder / "two-classes"
    if not few.exists():
        shutil.copytree(folder / "images" / "class0", few / "images" / "a")
        shutil.copytree(folder / "images" / "class1", few / "images" / "b")
        pack = Started(sys.executable, "launch/pack.py", "imagefolder", few / "images", few / "packed").wait()
        assert pack.code == 0, pack.stderr
    arguments.append(f"data.train={few / 'packed'}")
    finished = start_train(3, *arguments).wait()
    assert finished.code == 2, finished.stderr
    assert "head.num_classes: 2 classes cannot be cut over 3 ranks" in finished.errors[0]


def test_a_corrupt_image_on_one_rank_ends_all_ranks(folder: Path) -> None:
    """The shard stays a valid tar of the right size; one image in it does not decode."""
    broken = folder / "broken"
    shutil.copytree(folder / "packed", broken)
    index = json.loads((broken / "index" / "index.json").read_text())
    shard = broken / index["shards"][0]["name"]
    content = bytearray(shard.read_bytes())
    offset = int(np.load(broken / "index" / "offset.npy")[5])
    content[offset : offset + 200] = bytes(200)
    shard.write_bytes(content)
    finished = start_train(2, *options(folder, "bad-image", f"data.train={broken}")).wait()
    assert finished.code == 2, finished.stderr
    assert any("cannot decode" in line and shard.name in line for line in finished.errors), finished.stderr
    assert not (folder / "bad-image" / "done.json").exists()


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    first = start_train(1, *options(folder, "other", "optim.steps=1")).wait()
    assert first.code == 0, first.stderr
    path = folder / "other" / "checkpoints" / "step-00000001"
    wider = ("backbone.embedding_dim=24", f"checkpoint.resume={path}")
    finished = start_train(1, *options(folder, "bad-other", *wider)).wait()
    assert finished.code == 2, finished.stderr
    assert f"{path}: checkpoint of another model: backbone.embedding_dim was 16, is 24" in finished.errors[0]


def test_evaluate_and_pack_say_what_is_missing(tmp_path: Path) -> None:
    evaluate = Started(sys.executable, REPOSITORY / "launch" / "evaluate.py", tmp_path)
    pack = Started(
        sys.executable, REPOSITORY / "launch" / "pack.py", "imagefolder", tmp_path / "none", tmp_path
    )
    for started, text in ((evaluate, "config.yaml"), (pack, "none")):
        finished = started.wait()
        assert finished.code == 2, finished.stderr
        assert text in finished.errors[0]


def test_a_run_that_diverges_ends_on_all_ranks(folder: Path) -> None:
    """All ranks see the same numbers, so all stop in the same step; nothing says that the run is whole."""
    wild = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=null")
    finished = start_train(2, *options(folder, "bad-lr", *wild)).wait()
    assert finished.code == 1, finished.stderr
    assert "NonFiniteError: step " in finished.stderr
    assert not (folder / "bad-lr" / "done.json").exists()
