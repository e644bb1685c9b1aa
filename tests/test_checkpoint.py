import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer import checkpoint, manifest, tensorfile
from trainer.checkpoint import (
    Contents,
    complete_checkpoints,
    head_tensors,
    load_head,
    read_record,
    read_rows,
    read_tensors,
)
from trainer.config import OptimConfig
from trainer.errors import UserError
from trainer.head import ClassShard, SoftmaxHead
from trainer.manifest import MANIFEST
from trainer.optimizer import allocate_state, build_optimizer, parameter_groups, steps_taken
from trainer.saving import Checkpoints

NUM_CLASSES = 11


@pytest.fixture(scope="module")
def group() -> Iterator[ProcessGroup]:
    """A group of one rank: the calls are the real ones."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def shard_of(rank: int, num_ranks: int, num_classes: int = NUM_CLASSES) -> ClassShard:
    return ClassShard.of_rank(num_classes, rank, num_ranks)


def rows_of(shard: ClassShard) -> dict[str, Tensor]:
    """Return a head's tensors that tell their class: 2-D and 1-D, and their optimizer state."""
    classes = torch.arange(shard.start, shard.stop, dtype=torch.float32)
    rows_CD = classes[:, None] + torch.tensor([0.0, 0.25, 0.5])
    return {
        "parameter.weight_CD": rows_CD,
        "parameter.bias_C": classes,
        "optimizer.momentum_buffer.weight_CD": -rows_CD,
    }


def backbone_of(step: int) -> dict[str, Tensor]:
    return {"parameter.w": torch.full((2, 3), step / 3), "buffer.n": torch.tensor(step)}


def save(checkpoints: Checkpoints, step: int) -> Path:
    shard = shard_of(0, 1)
    return checkpoints.save(
        Contents(step, {"numbers": {"x": step / 3}}, backbone_of(step), rows_of(shard), shard)
    )


def write_ranks(folder: Path, num_ranks: int) -> Path:
    """Write what ``Checkpoints.save`` writes on several ranks."""
    folder.mkdir()
    for rank in range(num_ranks):
        shard = shard_of(rank, num_ranks)
        rows = {key: str(getattr(shard, key)) for key in ("start", "stop", "num_classes")}
        save_file(rows_of(shard), folder / f"head-{rank:05d}.safetensors", rows)
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def cut_short(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# Whole or absent


def test_what_was_saved_is_read_back_to_the_bit(tmp_path, group):
    path = save(Checkpoints(tmp_path, 2, group), 400)
    assert path == tmp_path / "step-00000400"
    assert read_record(path) == {"format": checkpoint.FORMAT, "step": 400, "numbers": {"x": 400 / 3}}
    assert_same(read_tensors(path / "backbone.safetensors"), backbone_of(400))
    assert_same(read_rows(path, shard_of(0, 1)), rows_of(shard_of(0, 1)))
    assert {p.name for p in path.iterdir()} == {
        "state.json",
        "backbone.safetensors",
        "head-00000.safetensors",
        "classes.json",
        MANIFEST,
    }


def test_tensors_that_are_views_are_saved_by_their_values(tmp_path, group):
    shard = shard_of(0, 1)
    transposed = torch.arange(33.0).reshape(3, NUM_CLASSES).T
    path = Checkpoints(tmp_path, 1, group).save(
        Contents(1, {}, {"parameter.w": transposed[::2]}, {"parameter.rows": transposed}, shard)
    )
    assert_same(read_rows(path, shard), {"parameter.rows": transposed.contiguous()})
    assert_same(read_tensors(path / "backbone.safetensors"), {"parameter.w": transposed[::2].contiguous()})


def test_the_newest_is_the_one_of_the_highest_step(tmp_path, group):
    checkpoints = Checkpoints(tmp_path / "not" / "there", 3, group)
    assert checkpoints.newest() is None
    for step in (9, 100, 20):
        path = save(checkpoints, step)
        assert path.is_dir()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-00000100"


def test_only_the_newest_are_kept_and_nothing_temporary(tmp_path, group):
    checkpoints = Checkpoints(tmp_path, 2, group)
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
        assert len(list(tmp_path.iterdir())) == min(step, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path, group):
    checkpoints = Checkpoints(tmp_path, 2, group)
    path = save(checkpoints, 5)
    (path / "left-over").touch()
    assert save(checkpoints, 5) == path
    assert not (path / "left-over").exists()
    assert_same(read_tensors(path / "backbone.safetensors"), backbone_of(5))


def test_a_half_written_folder_is_not_the_newest_and_is_replaced(tmp_path, group):
    checkpoints = Checkpoints(tmp_path, 2, group)
    whole = save(checkpoints, 5)
    half = tmp_path / ".tmp-step-00000006"
    half.mkdir()
    (half / "head-00007.safetensors").write_bytes(b"half")
    assert checkpoints.newest() == whole
    path = save(checkpoints, 6)
    assert checkpoints.newest() == path
    assert not half.exists()
    assert not (path / "head-00007.safetensors").exists()


@pytest.mark.parametrize(
    "failing",
    [
        (checkpoint, "write_tensors"),
        (checkpoint, "entry_of"),
        (checkpoint, "write_json"),
        (manifest, "write_manifest"),
        (manifest, "sync"),
        (tensorfile, "sync"),
    ],
    ids=lambda failing: failing[1],
)
def test_a_save_that_fails_leaves_the_older_ones_and_no_half_one(tmp_path, group, monkeypatch, failing):
    """A full disk, say. With keep_last=1 the old one must not go before the new one is there."""
    checkpoints = Checkpoints(tmp_path, 1, group)
    whole = save(checkpoints, 5)

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        expected = "step 6 could not be written, earlier ones are untouched: rank 0: .*No space left"
        with pytest.raises(UserError, match=expected):
            save(checkpoints, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005"]
    assert checkpoints.newest() == whole
    assert_same(read_tensors(whole / "backbone.safetensors"), backbone_of(5))
    assert save(checkpoints, 6) == checkpoints.newest()


def test_a_checkpoint_holds_json_and_safetensors_only(tmp_path, group):
    """Nothing in it could run code: not a zip (torch.save), no pickle."""
    for path in save(Checkpoints(tmp_path, 1, group), 1).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
            continue
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        assert isinstance(json.loads(content[8 : 8 + header]), dict)


# Rows on another number of ranks


@pytest.mark.parametrize("num_writers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_readers", [1, 2, 3, 5])
def test_rows_are_read_on_any_number_of_ranks(tmp_path, num_writers, num_readers):
    path = write_ranks(tmp_path / "step-00000001", num_writers)
    for rank in range(num_readers):
        shard = shard_of(rank, num_readers)
        assert_same(read_rows(path, shard), rows_of(shard))


def test_another_number_of_classes_is_refused(tmp_path):
    path = write_ranks(tmp_path / "step-00000001", 3)
    with pytest.raises(UserError) as caught:
        read_rows(path, shard_of(0, 2, num_classes=12))
    assert str(caught.value) == f"{path}: holds 11 classes, this run has 12"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_that_are_missing_are_named(tmp_path, rank):
    path = write_ranks(tmp_path / "step-00000001", 3)
    (path / f"head-{rank:05d}.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        read_rows(path, shard_of(0, 1))
    assert str(caught.value) == f"{path}: rows 0 to 11 of the head are not all there"


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="rows 0 to 11 of the head are not all there"):
        read_rows(tmp_path, shard_of(0, 1))


# Broken files


def message_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_truncated_backbone_is_refused_by_name(tmp_path, group, size):
    path = save(Checkpoints(tmp_path, 1, group), 1) / "backbone.safetensors"
    cut_short(path, size)
    assert message_of(read_tensors, path).startswith(f"{path}: cannot read: ")


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_truncated_head_is_refused_by_name(tmp_path, size):
    path = write_ranks(tmp_path / "step-00000001", 3)
    broken = path / "head-00001.safetensors"
    cut_short(broken, size)
    assert message_of(read_rows, path, shard_of(0, 1)).startswith(f"{broken}: cannot read: ")


def test_a_head_that_does_not_say_its_rows_is_refused_by_name(tmp_path):
    foreign = tmp_path / "head-00000.safetensors"
    save_file(rows_of(shard_of(0, 1)), foreign)
    assert message_of(read_rows, tmp_path, shard_of(0, 1)).startswith(f"{foreign}: ")


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = tmp_path / "backbone.safetensors"
    assert message_of(read_tensors, path).startswith(f"{path}: cannot read: ")


@pytest.mark.parametrize("content", [None, "", '{"format": 1', "[1]", "3"])
def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    assert message_of(read_record, tmp_path).startswith(f"{tmp_path}: not a checkpoint: ")


@pytest.mark.parametrize("number", [None, checkpoint.FORMAT + 1])
def test_another_format_is_refused_with_both_numbers(tmp_path, number):
    (tmp_path / "state.json").write_text(json.dumps({"format": number} if number else {}))
    expected = f"{tmp_path}: checkpoint format {number}, this version reads {checkpoint.FORMAT}"
    assert message_of(read_record, tmp_path) == expected


# The head's tensors


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_head_goes_on_as_if_it_had_not_been_saved(tmp_path, group, name):
    """Three steps in one go, or two, a checkpoint and one more: the same rows to the bit."""
    config = OptimConfig(name=name, lr=0.05, steps=3)
    shard = shard_of(0, 1)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        head = SoftmaxHead(shard, 3, seed=1, group=group)
        optimizer = build_optimizer(config, parameter_groups(head, 0.01))
        allocate_state(optimizer)
        return head, optimizer

    def step(head: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in head.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    straight, optimizer = build()
    for number in range(3):
        step(straight, optimizer, number)

    first, optimizer = build()
    for number in range(2):
        step(first, optimizer, number)
    record = {"steps": steps_taken(optimizer)}
    path = Checkpoints(tmp_path, 1, group).save(
        Contents(2, record, {}, head_tensors(first, optimizer), shard)
    )

    second, optimizer = build()
    load_head(second, optimizer, read_rows(path, shard), read_record(path)["steps"])
    step(second, optimizer, 2)
    assert_same(second.state_dict(), straight.state_dict())


def test_rows_alone_are_loaded_without_an_optimizer(group):
    shard = shard_of(0, 1)
    head = SoftmaxHead(shard, 3, seed=1, group=group)
    load_head(head, None, rows_of(shard))
    assert_same(
        head.state_dict(), {"weight_CD": rows_of(shard)["parameter.weight_CD"], "bias_C": torch.arange(11.0)}
    )


def test_a_folder_may_be_moved(tmp_path, group):
    path = save(Checkpoints(tmp_path / "a", 1, group), 3)
    moved = shutil.move(path, tmp_path / "elsewhere")
    assert read_record(Path(moved))["step"] == 3
