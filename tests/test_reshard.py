"""Saved on some number of ranks, loaded on another: the same logical arrays to the bit.

What was loaded is saved again by the ranks that loaded it; the two checkpoints have to hold the same.
"""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_joint import NUM_CLASSES, Tree, tree_of, update
from torch import Tensor

from trainer.checkpoint import read_record, read_rows, read_tensors
from trainer.config import from_dict
from trainer.distributed import World
from trainer.head import ClassShard
from trainer.loop import build_checkpoints
from trainer.resume import resume
from trainer.state import build_state, save
from trainer.update import build_step

DATA: Any = SimpleNamespace(fingerprint="data", class_names=[f"class {i}" for i in range(NUM_CLASSES)])
STEPS = 2

OPTIMIZERS = {"sgd": ("sgd", "same"), "adamw": ("adamw", "same"), "row_adagrad": ("sgd", "row_adagrad")}
HEADS = {
    "fused": ("fused", "float32"),
    "bfloat16": ("fused", "bfloat16"),
    "autograd": ("autograd", "float32"),
}
VARIANTS = {
    f"ZeRO {stage}, {optimizer}, {head}": tree_of(
        engine__zero_stage=stage,
        optim__name=OPTIMIZERS[optimizer][0],
        head__optimizer=OPTIMIZERS[optimizer][1],
        head__update=HEADS[head][0],
        head__state_dtype=HEADS[head][1],
        head__scale=8.0,
    )
    for stage, optimizer, head in product((0, 1, 2), OPTIMIZERS, HEADS)
}
# Every stage, optimizer, head and number of ranks once, in both directions.
SAMPLE = {
    (2, 3): ("ZeRO 1, adamw, fused", "ZeRO 0, sgd, bfloat16"),
    (3, 1): ("ZeRO 2, sgd, autograd",),
    (1, 4): ("ZeRO 2, row_adagrad, bfloat16",),
}


def in_folder(tree: Tree, folder: Path, name: str) -> Tree:
    return tree | {"run": {"root": str(folder), "name": name.replace(", ", "-").replace(" ", "")}}


def train_and_save(world: World, folder: Path, trees: dict[str, Tree]) -> None:
    for name, tree in trees.items():
        config = from_dict(in_folder(tree, folder, name))
        state = build_state(config, world)
        step_function = build_step(state, config, world)
        for step in range(STEPS):
            update(step_function, config, world, step)
        state.step = STEPS
        save(state, config, build_checkpoints(config, world), DATA)


def load_and_save(world: World, source: Path, target: Path, trees: dict[str, Tree]) -> None:
    for name, tree in trees.items():
        config = from_dict(in_folder(tree, source, name))
        state = build_state(config, world)
        resume(state, config, build_checkpoints(config, world), DATA.fingerprint)
        assert state.step == STEPS
        there = from_dict(in_folder(tree, target, name))
        save(state, there, build_checkpoints(there, world), DATA)


def logical(path: Path) -> dict[str, Tensor]:
    whole = ClassShard.of_rank(NUM_CLASSES, 0, 1)
    return read_tensors(path / "backbone.safetensors") | read_rows(path, whole)


def assert_same_arrays(
    source: Path, target: Path, writers: int, readers: int, names: tuple[str, ...]
) -> None:
    for name in names:
        before, after = (
            from_dict(in_folder(VARIANTS[name], folder, name)).run_folder / "checkpoints" / "step-00000002"
            for folder in (source, target)
        )
        assert len(list(before.glob("head-*"))) == writers
        assert len(list(after.glob("head-*"))) == readers
        expected, found = logical(before), logical(after)
        assert expected.keys() == found.keys(), name
        for key, value in expected.items():
            assert found[key].dtype == value.dtype, (name, key)
            assert torch.equal(found[key], value), (name, key)
        moments = [key for key in expected if key.startswith("optimizer.")]
        assert any("centroids" in key for key in moments)
        assert any("centroids" not in key for key in moments)
        assert all(expected[key].abs().sum() > 0 for key in moments), name  # or nothing was proved
        records = [read_record(path) for path in (before, after)]
        for key in ("numbers", "position", "loss", "data_fingerprint"):
            assert records[0][key] == records[1][key], (name, key)


@pytest.mark.parametrize(("writers", "readers"), SAMPLE, ids=lambda number: str(number))
def test_a_sample_of_states_is_the_same_on_other_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    names = SAMPLE[writers, readers]
    trees = {name: VARIANTS[name] for name in names}
    run_on_ranks(train_and_save, writers, tmp_path / "a", trees)
    run_on_ranks(load_and_save, readers, tmp_path / "a", tmp_path / "b", trees)
    assert_same_arrays(tmp_path / "a", tmp_path / "b", writers, readers, names)


@pytest.mark.nightly
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_every_state_is_the_same_on_any_number_of_ranks(tmp_path: Path, writers: int) -> None:
    run_on_ranks(train_and_save, writers, tmp_path / "a", VARIANTS, timeout_seconds=600)
    for readers in (1, 2, 3, 4):
        target = tmp_path / f"b{readers}"
        run_on_ranks(load_and_save, readers, tmp_path / "a", target, VARIANTS, timeout_seconds=600)
        assert_same_arrays(tmp_path / "a", target, writers, readers, tuple(VARIANTS))
