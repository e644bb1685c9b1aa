"""A trained model on disk: found by run or checkpoint, read back, described, verified to the last row."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import Started
from safetensors.torch import load_file, save_file
from small_run import make_run, pack_photos, random_backbone

from trainer.errors import UserError
from trainer.head import ClassShard, initial_rows
from trainer.trained import describe, open_trained, verify


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = pack_photos(tmp_path, "data", {"ant": 2, "bee": 2, "cat": 2}, (32, 32))
    return make_run(tmp_path, data)


def test_a_run_is_its_newest_checkpoint_and_has_its_weights(run):
    trained = open_trained(run)
    assert trained.path == run / "checkpoints" / "step-00000007"
    assert open_trained(trained.path).class_names == ("ant", "bee", "cat")
    expected = random_backbone(trained.config).state_dict()
    for name, value in trained.build_backbone().state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_rows_come_in_order_in_blocks(run):
    blocks = list(open_trained(run).stream_rows(block=2))
    assert [low for low, _ in blocks] == [0, 2]
    rows = torch.cat([tensors["parameter.centroids_CD"] for _, tensors in blocks])
    assert torch.equal(rows, initial_rows(9, ClassShard(0, 3, 3), 12) * 1.7)


def test_a_checkpoint_describes_itself(run):
    said = describe(open_trained(run))
    assert (said["step"], said["epoch"], said["classes"], said["backbone"]) == (7, 2, 3, "resnet10t")
    assert said["files"]["backbone.safetensors"] > 10_000


def refused(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        verify(open_trained(run))
    return str(caught.value)


def test_what_is_not_whole_is_named(run):
    path = open_trained(run).path
    assert verify(open_trained(run))["head"] == 3 * 12 * 3
    tensors = load_file(path / "head-00000.safetensors")
    tensors["parameter.centroids_CD"][2, 1] = torch.nan
    save_file(tensors, path / "head-00000.safetensors", {"start": "0", "stop": "3", "num_classes": "3"})
    assert "parameter.centroids_CD from row 0 on holds a number that is not finite" in refused(run)
    save_file(tensors, path / "head-00000.safetensors", {"start": "0", "stop": "2", "num_classes": "3"})
    assert str(path) in refused(run)
    (path / "backbone.safetensors").write_bytes(b"short")
    assert refused(run).startswith(f"{path / 'backbone.safetensors'}: cannot read")


@pytest.mark.nightly
def test_the_command_shows_verifies_and_exports_the_head(run, tmp_path):
    program = "launch/checkpoint.py"
    shown = Started(sys.executable, program, "show", run, "--json").wait()
    assert json.loads(shown.stdout)["step"] == 7
    assert json.loads(Started(sys.executable, program, "verify", run, "--json").wait().stdout)["whole"]
    out = tmp_path / "head.safetensors"
    assert Started(sys.executable, program, "export-head", run, out).wait().code == 0
    assert load_file(out)["centroids"].shape == (3, 12)
    assert Started(sys.executable, program, "export-head", run, out).wait().code == 2
