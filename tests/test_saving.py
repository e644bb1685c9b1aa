"""Saving by several ranks: agreed when it fails, behind training if asked, and what is kept afterwards."""

import fcntl
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from trainer import checkpoint, manifest, saving
from trainer.checkpoint import Contents, complete_checkpoints, read_rows, read_tensors, verify
from trainer.distributed import World
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.manifest import Entry
from trainer.saving import Checkpoints

NUM_CLASSES = 11


def save(checkpoints: Checkpoints, step: int, world: World, **record: object) -> Path:
    shard, tensors = state_of(step, world.rank, world.size)
    return checkpoints.save(Contents(step, record, backbone_of(step), tensors, shard, ["a", "b"]))


def state_of(step: int, rank: int, size: int) -> tuple[ClassShard, dict[str, Tensor]]:
    shard = ClassShard.of_rank(NUM_CLASSES, rank, size)
    return shard, {
        "parameter.rows": torch.arange(shard.start, shard.stop)[:, None] + torch.full((1, 3), step / 7)
    }


def backbone_of(step: int) -> dict[str, Tensor]:
    return {"parameter.w": torch.full((2, 3), step / 3)}


def failure_of(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(path: Path, step: int) -> None:
    verify(path)
    shard, rows = state_of(step, 0, 1)
    assert torch.equal(read_rows(path, shard)["parameter.rows"], rows["parameter.rows"])
    assert torch.equal(
        read_tensors(path / "backbone.safetensors")["parameter.w"], backbone_of(step)["parameter.w"]
    )


# Agreed


def fail_on_rank_1(world: World, folder: Path) -> str:
    checkpoints = Checkpoints(folder, 1, world.group)
    save(checkpoints, 1, world)
    plain = checkpoint.write_tensors
    if world.rank == 1:

        def write(path: Path, *_: object) -> None:
            path.write_bytes(b"half")
            raise PermissionError(13, "Permission denied", str(path))

        checkpoint.write_tensors = write
    message = failure_of(lambda: save(checkpoints, 2, world))
    checkpoint.write_tensors = plain
    assert checkpoints.newest() == folder / "step-00000001"
    save(checkpoints, 3, world)
    return message


def test_what_fails_on_one_rank_is_told_by_all_and_the_next_save_works(tmp_path: Path) -> None:
    messages = run_on_ranks(fail_on_rank_1, 3, tmp_path)
    path = tmp_path / ".tmp-step-00000002" / "head-00001.safetensors"
    assert (
        messages
        == [
            f"{tmp_path}: the checkpoint of step 2 could not be written, earlier ones are untouched: "
            f"rank 1: [Errno 13] Permission denied: '{path}'"
        ]
        * 3
    )
    assert names_in(tmp_path) == ["step-00000003"]
    assert_holds(tmp_path / "step-00000003", 3)


def save_without_room(world: World, folder: Path) -> str:
    checkpoints = Checkpoints(folder, 1, world.group)
    save(checkpoints, 1, world)
    saving.shutil.disk_usage = lambda _: _Usage(100)
    return failure_of(lambda: save(checkpoints, 2, world))


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    messages = run_on_ranks(save_without_room, 2, tmp_path)
    needed = NUM_CLASSES * 3 * 4 + 2 * 3 * 4
    assert f"rank 0: [Errno 28] it needs {needed} bytes, 100 are free" in messages[0]
    assert messages[0] == messages[1]
    assert names_in(tmp_path) == ["step-00000001"]


def find_rubbish(world: World, folder: Path) -> str:
    checkpoints = Checkpoints(folder, 3, world.group)
    for step in (1, 2):
        save(checkpoints, step, world)
    (folder / "step-00000002").rename(folder / f"{manifest.REPLACED}00000002")
    (folder / f"{manifest.TEMPORARY}00000009").mkdir()
    warnings: list[str] = []
    manifest.log.warning = lambda text, *values: warnings.append(text % values)
    save(checkpoints, 3, world)
    return "\n".join(warnings)


def test_what_broken_saves_left_is_removed_aloud_and_what_they_were_to_replace_returns(
    tmp_path: Path,
) -> None:
    [said] = run_on_ranks(find_rubbish, 1, tmp_path)
    assert f"{tmp_path / 'step-00000002'}: restored" in said
    assert f"{tmp_path / '.tmp-step-00000009'}: removed" in said
    assert names_in(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert_holds(tmp_path / "step-00000002", 2)


# Behind training


def save_behind(world: World, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 5, world.group)
    may_write, plain = threading.Event(), checkpoint.write_tensors

    def write(*arguments: object) -> Entry:
        assert may_write.wait(30)
        return plain(*arguments)  # type: ignore[arg-type]

    checkpoint.write_tensors = write
    shard, rows = state_of(1, world.rank, world.size)
    checkpoints.start(Contents(1, {}, backbone_of(1), rows, shard))
    assert checkpoints.is_writing
    assert checkpoints.newest() is None
    may_write.set()
    shard, rows = state_of(2, world.rank, world.size)
    checkpoints.start(Contents(2, {}, backbone_of(2), rows, shard))  # the first is finished before
    assert checkpoints.all() == [folder / "step-00000001"]
    assert checkpoints.finish() == folder / "step-00000002"
    assert checkpoints.finish() is None
    assert not checkpoints.is_writing


def test_a_save_behind_training_is_complete_when_finished_and_never_two_at_once(tmp_path: Path) -> None:
    run_on_ranks(save_behind, 2, tmp_path)
    for step in (1, 2):
        assert_holds(tmp_path / f"step-0000000{step}", step)


def copy_twice(world: World, folder: Path) -> bool:
    checkpoints = Checkpoints(folder, 5, world.group)
    places = []
    for step in (1, 2):
        shard, rows = state_of(step, world.rank, world.size)
        copies = checkpoints.copied(Contents(step, {}, backbone_of(step), rows, shard))
        assert copies.backbone.keys() == ({"parameter.w"} if world.rank == 0 else set())
        rows["parameter.rows"].zero_()
        assert torch.equal(
            copies.head["parameter.rows"], state_of(step, world.rank, world.size)[1]["parameter.rows"]
        )
        places.append(copies.head["parameter.rows"].data_ptr())
    return places[0] == places[1]


def test_the_memory_of_the_copy_is_taken_once(tmp_path: Path) -> None:
    assert run_on_ranks(copy_twice, 2, tmp_path) == [True, True]


def complete_behind(world: World, folder: Path) -> list[str]:
    checkpoints = Checkpoints(folder, 1, world.group)
    save(checkpoints, 1, world)
    may_remove, plain = threading.Event(), saving.shutil.rmtree

    def remove(*arguments: Any, **more: Any) -> None:
        assert may_remove.wait(30)
        plain(*arguments, **more)

    saving.shutil.rmtree = remove
    shard, rows = state_of(2, world.rank, world.size)
    checkpoints.start(Contents(2, {}, backbone_of(2), rows, shard))
    assert checkpoints.proceed() is None  # all have written: the rest is the work of rank 0's thread
    assert checkpoints.is_writing or world.rank > 0
    while not (folder / "step-00000002").exists():
        time.sleep(0.01)
    rows["parameter.rows"].zero_()
    may_remove.set()
    assert checkpoints.finish() == folder / "step-00000002"
    return names_in(folder)


def test_old_checkpoints_are_removed_behind_training_too(tmp_path: Path) -> None:
    assert run_on_ranks(complete_behind, 2, tmp_path) == [["step-00000002"]] * 2
    assert_holds(tmp_path / "step-00000002", 2)


# What is kept


def save_many(world: World, folder: Path) -> None:
    best = {"keep_best": "eval/same/accuracy"}
    checkpoints = Checkpoints(folder, 2, world.group, keep_every=4, **best)
    for step, accuracy in enumerate([0.1, 0.5, 0.9, None, 0.9, 0.2, 0.3, 0.4, 0.1, 0.1], start=1):
        save(checkpoints, step, world, metrics={} if accuracy is None else {"eval/same/accuracy": accuracy})


def test_the_newest_the_multiples_and_the_best_are_kept(tmp_path: Path) -> None:
    run_on_ranks(save_many, 1, tmp_path)
    # of 3 and 5, which are equally good, 3 went when 5 came to be the best
    assert [int(name.removeprefix("step-")) for name in names_in(tmp_path)] == [4, 5, 8, 9, 10]


def save_beside_a_broken_one(world: World, folder: Path) -> str:
    warnings: list[str] = []
    manifest.log.warning = lambda text, *values: warnings.append(text % values)
    checkpoints = Checkpoints(folder, 2, world.group, keep_best="accuracy")
    save(checkpoints, 1, world, metrics={"accuracy": 0.5})
    (folder / "step-00000001" / "state.json").write_text("{")
    save(checkpoints, 2, world, metrics={"accuracy": 0.1})
    return "\n".join(warnings)


def test_an_older_record_that_cannot_be_read_is_passed_over_aloud(tmp_path: Path) -> None:
    [said] = run_on_ranks(save_beside_a_broken_one, 1, tmp_path)
    assert said.startswith(
        f"checkpoint.keep_best: passed over: {tmp_path / 'step-00000001'}: not a checkpoint"
    )
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("keep_last", [1, 2, 7])
@pytest.mark.parametrize("keep_every", [None, 1, 3])
@pytest.mark.parametrize("best", [None, 2])
def test_what_may_go_is_neither_new_nor_a_multiple_nor_the_best(keep_last, keep_every, best) -> None:
    gone = manifest.superfluous(range(1, 7), keep_last=keep_last, keep_every=keep_every, best=best)
    kept = set(range(1, 7)) - set(gone)
    newest = set(range(7 - min(keep_last, 6), 7))
    multiples = {step for step in range(1, 7) if keep_every and step % keep_every == 0}
    assert kept == newest | multiples | ({best} if best else set())


def set_aside(world: World, folder: Path) -> list[Path]:
    checkpoints = Checkpoints(folder, 5, world.group)
    paths = [save(checkpoints, step, world) for step in (1, 2, 3)]
    places = [checkpoints.set_aside([path], "superseded") for path in paths[1:]]
    assert checkpoints.all() == paths[:1]
    return places


def test_checkpoints_set_aside_are_whole_but_no_longer_found(tmp_path: Path) -> None:
    [places, *_] = run_on_ranks(set_aside, 2, tmp_path)
    assert places == [tmp_path / "superseded", tmp_path / "superseded-2"]
    assert_holds(tmp_path / "superseded" / "step-00000002", 2)
    assert_holds(tmp_path / "superseded-2" / "step-00000003", 3)


# Damage


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def save_one(world: World, folder: Path) -> None:
    save(Checkpoints(folder, 1, world.group), 1, world)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    run_on_ranks(save_one, 2, folder)
    return folder / "step-00000001"


FILES = (
    "backbone.safetensors",
    "classes.json",
    "head-00000.safetensors",
    "head-00001.safetensors",
    "state.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["first bit", "middle bit", "last bit", "cut", "longer", "gone"])
def test_a_damaged_file_is_named(written: Path, name: str, way: str) -> None:
    path = written / name
    whole = path.read_bytes()
    try:
        if way == "gone":
            path.unlink()
        elif way == "cut":
            path.write_bytes(whole[:-1])
        elif way == "longer":
            path.write_bytes(whole + b"\0")
        else:
            flip_bit(
                path, {"first bit": 0, "middle bit": 4 * len(whole), "last bit": 8 * len(whole) - 1}[way]
            )
        [line] = manifest.damage(written)
        assert line.startswith(f"{path}: ")
        # read by parts, as ranks do, one of them sees it
        assert [line for part in range(3) for line in manifest.damage(written, part, 3)] == [line]
    finally:
        path.write_bytes(whole)
    verify(written)


def test_every_flipped_bit_of_a_file_is_found(written: Path) -> None:
    path = written / "head-00001.safetensors"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 61):
        flip_bit(path, bit)
        assert manifest.damage(written), bit
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"files": 3}', '{"files": {"a": {"size": 1}}}'])
def test_a_broken_manifest_is_damage(written: Path, content: str | None) -> None:
    path = written / manifest.MANIFEST
    whole = path.read_text()
    try:
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match=f"damaged checkpoint: {path}: "):
            verify(written)
    finally:
        path.write_text(whole)


def test_rows_of_another_save_among_the_files_are_damage(written: Path) -> None:
    stray = written / "head-00002.safetensors"
    stray.write_bytes((written / "head-00001.safetensors").read_bytes())
    try:
        assert manifest.damage(written) == [f"{stray}: is not in the manifest"]
    finally:
        stray.unlink()


def test_class_names_are_part_of_a_checkpoint(written: Path) -> None:
    assert json.loads((written / "classes.json").read_text()) == ["a", "b"]


def test_only_names_that_are_steps_count(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-100000000", "step-00000001-copy", "step-old", ".tmp-step-00000003"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]


def go_on_while_saving(world: World, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 5, world.group)
    for step in (1, 2):
        shard, rows = state_of(step, world.rank, world.size)
        checkpoints.start(Contents(step, {}, backbone_of(step), rows, shard))
        rows["parameter.rows"].zero_()  # training goes on
    checkpoints.finish()


def test_what_is_written_behind_training_is_the_state_at_the_start(tmp_path: Path) -> None:
    run_on_ranks(go_on_while_saving, 2, tmp_path)
    for step in (1, 2):
        assert_holds(tmp_path / f"step-0000000{step}", step)


def claim(world: World, folder: Path) -> str:
    return failure_of(Checkpoints(folder, 1, world.group).claim)


def test_two_runs_cannot_save_into_one_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        for message in run_on_ranks(claim, 2, tmp_path):
            assert message.startswith(f"{tmp_path}: another process is training in this folder: rank 0: ")
