"""Which checkpoint a run goes on from, and what may have changed since it was written."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from trainer.checkpoint import Contents
from trainer.config import Config, from_dict, to_dict
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.manifest import MANIFEST, verify
from trainer.resume import check_same_training, choose, keep_curve
from trainer.saving import Checkpoints


@pytest.fixture(scope="module")
def group() -> Iterator[ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    caplog.set_level(logging.INFO, "trainer")
    return caplog


def config_of(folder: Path, **fields: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {"train": "here", "batch_size": 8}, "run": {"root": str(folder), "name": "run"},
        "optim": {"steps": 10}, "head": {"num_classes": 4},
    }  # fmt: skip
    for name, value in fields.items():
        section, field = name.split("__")
        tree.setdefault(section, {})[field] = value
    return from_dict(tree)


def checkpoints_of(folder: Path, group: ProcessGroup, *steps: int, **record: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder / "run" / "checkpoints", 9, group)
    for step in steps:
        rows = {"parameter.rows": torch.full((4, 2), float(step))}
        contents = Contents(step, record, {"parameter.w": torch.ones(3)}, rows, ClassShard.of_rank(4, 0, 1))
        checkpoints.save(contents)
    return checkpoints


def damage(path: Path) -> None:
    file = path / "head-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


# Which one


def test_auto_takes_the_newest_and_begins_where_there_is_none(tmp_path, group):
    checkpoints = checkpoints_of(tmp_path, group)
    assert choose(config_of(tmp_path), checkpoints) == (None, [])
    checkpoints_of(tmp_path, group, 3, 6)
    assert choose(config_of(tmp_path), checkpoints) == (checkpoints.folder / "step-00000006", [])


def test_auto_passes_over_damaged_ones_aloud_and_keeps_them(tmp_path, group, warnings):
    checkpoints = checkpoints_of(tmp_path, group, 3, 6, 9)
    for step in (6, 9):
        damage(checkpoints.folder / f"step-0000000{step}")
    assert choose(config_of(tmp_path), checkpoints) == (checkpoints.folder / "step-00000003", [])
    for step in (6, 9):
        file = checkpoints.folder / f"step-0000000{step}" / "head-00000.safetensors"
        assert f"damaged checkpoint: {file}: its content is not what was written" in warnings.text
        assert (checkpoints.folder / "damaged" / f"step-0000000{step}" / file.name).exists()
    assert [path.name for path in checkpoints.all()] == ["step-00000003"]


def test_auto_does_not_begin_anew_when_all_are_damaged(tmp_path, group):
    checkpoints = checkpoints_of(tmp_path, group, 3, 6)
    for path in checkpoints.all():
        damage(path)
    with pytest.raises(UserError, match=r"damaged checkpoint: .*head-00000.*; no other is left in "):
        choose(config_of(tmp_path), checkpoints)
    assert len(checkpoints.all()) == 2


def test_a_damaged_checkpoint_that_was_named_is_refused(tmp_path, group):
    checkpoints = checkpoints_of(tmp_path, group, 3, 6)
    path = checkpoints.folder / "step-00000006"
    damage(path)
    with pytest.raises(UserError, match=f"^damaged checkpoint: {path}/head-00000.safetensors: its content"):
        choose(config_of(tmp_path, checkpoint__resume=str(path)), checkpoints)


def test_never_refuses_a_folder_that_has_some(tmp_path, group):
    config = config_of(tmp_path, checkpoint__resume="never")
    assert choose(config, checkpoints_of(tmp_path, group)) == (None, [])
    with pytest.raises(UserError, match=r"checkpoint.resume: never, but .*step-00000003 exists"):
        choose(config, checkpoints_of(tmp_path, group, 3))


def test_going_back_sets_newer_ones_and_their_curve_aside_and_happens_once(tmp_path, group):
    checkpoints = checkpoints_of(tmp_path, group, 3, 6, 9)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 9}\n')
    older = checkpoints.folder / "step-00000003"
    config = config_of(tmp_path, checkpoint__resume=str(older))
    path, superseded = choose(config, checkpoints)
    assert (path, [other.name for other in superseded]) == (older, ["step-00000006", "step-00000009"])
    keep_curve(config, checkpoints, superseded)
    assert checkpoints.all() == [older]
    verify(checkpoints.folder / "superseded" / "step-00000009")
    assert (checkpoints.folder / "superseded" / "metrics.jsonl").read_text() == '{"step": 9}\n'
    # the same command again goes on from what was saved since, and not back once more
    checkpoints_of(tmp_path, group, 5, started_from=str(older.resolve()))
    assert choose(config, checkpoints) == (checkpoints.folder / "step-00000005", [])


def test_another_run_s_checkpoint_begins_a_folder_once_and_is_not_mixed_with_others(tmp_path, group):
    there = checkpoints_of(tmp_path / "other", group, 3).folder / "step-00000003"
    config = config_of(tmp_path, checkpoint__resume=str(there))
    here = checkpoints_of(tmp_path, group)
    assert choose(config, here) == (there, [])
    checkpoints_of(tmp_path, group, 4, started_from=str(there.resolve()))
    assert choose(config, here) == (here.folder / "step-00000004", [])
    checkpoints_of(tmp_path, group, 5)  # of another history
    with pytest.raises(UserError, match=r"is not where .*step-00000005 began: the two would mix"):
        choose(config, here)


def test_format_1_has_no_checksums_and_is_taken_aloud(tmp_path, group, warnings):
    checkpoints = checkpoints_of(tmp_path, group, 3)
    path = checkpoints.folder / "step-00000003"
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | {"format": 1}))
    (path / MANIFEST).unlink()
    assert choose(config_of(tmp_path), checkpoints) == (path, [])
    assert "has no checksums (format 1)" in warnings.text


def test_format_2_without_its_manifest_is_damaged(tmp_path, group):
    checkpoints = checkpoints_of(tmp_path, group, 3)
    (checkpoints.folder / "step-00000003" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest.json: .*No such file"):
        choose(config_of(tmp_path), checkpoints)


# Whether this run may


def check(before: Config, now: Config, fingerprint: str = "same") -> None:
    check_same_training(Path("it"), {"config": to_dict(before), "data_fingerprint": "same"}, now, fingerprint)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optim__steps", 20), ("optim__lr", 0.2), ("optim__schedule", "linear"), ("data__workers", 0),
        ("data__train", "moved"), ("log__every_steps", 7), ("eval__every_steps", 7), ("run__name", "other"),
        ("checkpoint__keep_last", 7), ("engine__zero_stage", 1), ("head__update", "autograd"),
    ],
)  # fmt: skip
def test_what_may_change_is_told(tmp_path, warnings, field, value):
    check(config_of(tmp_path), config_of(tmp_path, **{field: value}))
    assert f"changed since the checkpoint: {field.replace('__', '.')} was " in warnings.text
    assert not [record for record in warnings.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(("field", "value"), [("data__batch_size", 16), ("engine__dtype", "bfloat16")])
def test_what_bends_the_curve_is_a_warning(tmp_path, warnings, field, value):
    check(config_of(tmp_path), config_of(tmp_path, **{field: value}))
    [warning] = [record for record in warnings.records if record.levelno == logging.WARNING]
    assert field.replace("__", ".") in warning.getMessage()


def test_another_training_is_refused_with_all_its_differences_unless_allowed(tmp_path):
    changed = {"optim__weight_decay": 0.1, "augment__flip": 0.5, "optim__lr": 0.7}
    with pytest.raises(UserError) as caught:
        check(config_of(tmp_path), config_of(tmp_path, **changed))
    assert str(caught.value) == (
        "it: another training: augment.flip was 0.0, is 0.5; optim.weight_decay was 0.0005, is 0.1; "
        "to allow it: checkpoint.allow_changes=[augment.flip,optim.weight_decay]"
    )
    allowed = {"checkpoint__allow_changes": ["augment.flip", "optim.weight_decay"]}
    check(config_of(tmp_path), config_of(tmp_path, **changed, **allowed))


@pytest.mark.parametrize(("field", "value"), [("head__num_classes", 5), ("backbone__embedding_dim", 8)])
def test_another_model_is_refused_even_if_allowed(tmp_path, field, value):
    name = field.replace("__", ".")
    now = config_of(tmp_path, checkpoint__allow_changes=[name], **{field: value})
    with pytest.raises(UserError, match=f"^it: checkpoint of another model: {name} was "):
        check(config_of(tmp_path), now)


def test_other_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.train: here is not the data this checkpoint was trained on"):
        check(config_of(tmp_path), config_of(tmp_path), fingerprint="other")


def test_a_field_that_an_older_checkpoint_does_not_know_had_its_default(tmp_path):
    tree = to_dict(config_of(tmp_path))
    del tree["augment"]["flip"]
    record = {"config": tree, "data_fingerprint": "same"}
    check_same_training(Path("it"), record, config_of(tmp_path), "same")
    with pytest.raises(UserError, match=r"augment.flip was 0.0, is 0.5"):
        check_same_training(Path("it"), record, config_of(tmp_path, augment__flip=0.5), "same")
