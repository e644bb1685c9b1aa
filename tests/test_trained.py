"""A trained model on disk: found by run or checkpoint, read back, described, verified to the last row."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from launching import Started
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from small_run import make_run, pack_photos, random_backbone, with_run
from torch import Tensor

from trainer.checkpoint import Contents
from trainer.config import Config, to_dict
from trainer.diagnostics import view_head
from trainer.distributed import World, joined_world
from trainer.errors import UserError
from trainer.export import write_centroids
from trainer.head import ClassShard, initial_rows
from trainer.manifest import MANIFEST, entry_of, write_manifest
from trainer.models import load_model, open_model
from trainer.saving import Checkpoints
from trainer.state import build_head
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


def write_anew(path: Path) -> None:
    """Give a checkpoint the manifest of its files as they are."""
    files = [file for file in path.iterdir() if file.name != MANIFEST]
    write_manifest(path, {file.name: entry_of(file) for file in files})


@pytest.mark.parametrize("name", ["backbone.safetensors", "head-00000.safetensors", "classes.json"])
def test_one_flipped_bit_is_found_by_whoever_reads_the_file(run, name):
    trained = open_trained(run)
    content = bytearray((trained.path / name).read_bytes())
    content[-3] ^= 1
    (trained.path / name).write_bytes(content)
    found = f"damaged checkpoint: {trained.path / name}: its content is not what was written (sha256 differs)"
    assert refused(run) == found
    with joined_world(60.0) as world, pytest.raises(UserError, match=re.escape(found)):
        open_model(run, world).centroids()
    with joined_world(60.0) as world, pytest.raises(UserError, match=re.escape(found)):
        load_model(run, trained.config, world)


def test_what_is_not_whole_is_named(run):
    path = open_trained(run).path
    assert verify(open_trained(run))["head"] == 3 * 12 * 3
    tensors = load_file(path / "head-00000.safetensors")
    tensors["parameter.centroids_CD"][2, 1] = torch.nan
    save_file(tensors, path / "head-00000.safetensors", {"start": "0", "stop": "3", "num_classes": "3"})
    write_anew(path)
    assert "parameter.centroids_CD from row 0 on holds a number that is not finite" in refused(run)
    save_file(tensors, path / "head-00000.safetensors", {"start": "0", "stop": "2", "num_classes": "3"})
    write_anew(path)
    assert str(path) in refused(run)
    (path / "backbone.safetensors").write_bytes(b"short")
    write_anew(path)
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


def save_and_open(
    world: World, config: Config, losses: list[dict], old: Path, out: Path
) -> list[dict[str, Tensor]]:
    """Save a head of every loss, open it again in every way; return what stands for the classes."""
    record = {"position": {}, "numbers": {}, "loss": {}, "data_fingerprint": "x"}
    backbone = load_file(old / "backbone.safetensors")
    found = []
    for number, changes in enumerate(losses):
        changed = with_run(config, run={"name": str(number)}, loss=changes)
        head = build_head(changed, world, 12)
        torch.manual_seed(world.rank)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
        rows = {f"parameter.{name}": value.detach() for name, value in head.named_parameters()}
        contents = Contents(
            7, record | {"config": to_dict(changed)}, backbone, rows, head.row_shard, ("ant", "bee", "cat")
        )
        saved = Checkpoints(out / str(number) / "checkpoints", 1, world.group).save(contents)
        centroids = open_model(saved, world).centroids
        assert centroids is not None
        write_centroids(open_trained(saved), out / f"{number}-{world.rank}.safetensors")
        _, again = load_model(saved, changed, world)
        assert torch.equal(again.directions_CD(), head.directions_CD())
        view = view_head(again, [], ("ant", "bee", "cat"), [])
        found.append(
            {"own": head.directions_CD(), "all": centroids(), "pairs": torch.tensor(view.neighbours.pairs)}
        )
    return found


def test_a_head_of_any_loss_has_its_classes_in_every_way_a_run_is_opened(tmp_path):
    data = pack_photos(tmp_path, "data", {"ant": 1, "bee": 1, "cat": 1}, (32, 32))
    run = make_run(tmp_path, data, backbone_name="lenetpp", channels=1, neck="linear")
    config = open_trained(run).config
    centres = config.loss.standalone_center
    losses = [
        {"name": "coco"},
        {"name": "softmax"},
        {"name": "center"},
        {"name": "triplet"},
        {"name": "triplet", "extra": {"softmax": 0.5, "center": 0.1}},
        {"name": "coco", "extra": {"center": 0.1, "contrastive": 1.0, "coco_minibatch": 1.0}},
        {"name": "standalone_center"},
        {"name": "standalone_center", "standalone_center": dataclasses.replace(centres, inter="classifier")},
        {"name": "arcface", "extra": {"standalone_center": 1.0}},
    ]
    ranks = run_on_ranks(save_and_open, 2, config, losses, run / "checkpoints" / "step-00000007", tmp_path)
    for number, parts in enumerate(zip(*ranks, strict=True)):
        expected_KD = torch.cat([part["own"] for part in parts])
        cosine_KK = expected_KD @ expected_KD.T
        for part in parts:
            units_KD = torch.nn.functional.normalize(part["all"].flatten(0, 1))
            torch.testing.assert_close(units_KD, expected_KD, msg=str(losses[number]))
            for cosine, a, b in part["pairs"].tolist():
                assert cosine == pytest.approx(float(cosine_KK[int(a), int(b)]), abs=1e-6), losses[number]
        written_KD = load_file(tmp_path / f"{number}-0.safetensors")["centroids"]
        torch.testing.assert_close(written_KD, expected_KD)
