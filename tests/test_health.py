"""Whether ranks agree on their weights and compute numbers: on real ranks."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from test_joint import Tree, tree_of, update, weights_of
from torch import nn

from trainer.config import from_dict
from trainer.distributed import World
from trainer.health import (
    DivergedError,
    NonFinite,
    NonFiniteError,
    require_equal_weights,
    weights_hash,
)
from trainer.state import build_state
from trainer.update import build_step

# Copies of the weights


def compare_weights(world: World, different: tuple[int, ...]) -> str:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).to(torch.bfloat16 if world.size == 4 else None)
    require_equal_weights(module, world.group, 7)
    if world.rank in different:
        bits = module[0].bias.detach().view(torch.int16 if world.size == 4 else torch.int32)
        bits[1] ^= 1
    try:
        require_equal_weights(module, world.group, 8)
    except DivergedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("ranks", "different"), [(3, (1,)), (4, (3,)), (2, ())])
def test_copies_that_differ_by_one_bit_are_named_on_every_rank(ranks: int, different: tuple) -> None:
    for message in run_on_ranks(compare_weights, ranks, different):
        expected = f"step 8: the backbone of ranks {list(different)} is not that of the other ranks"
        assert message.startswith(expected) if different else message == ""


def test_every_single_bit_of_the_weights_counts() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    before, seen = weights_hash(module), set()
    for parameter in module.parameters():
        bits = parameter.detach().view(-1).view(torch.int32)
        for i in range(len(bits)):
            for bit in range(31):
                bits[i] ^= 1 << bit
                seen.add(weights_hash(module))
                bits[i] ^= 1 << bit
    assert before not in seen
    assert weights_hash(module) == before


# Numbers that are none


def meet_nan(world: World, folder: Path) -> list[str]:
    guard = NonFinite("skip", 2, folder, world.group)
    statistics = torch.ones(2)
    embeddings = torch.zeros(3, 4)
    if world.rank == 1:
        embeddings[2, 1] = float("nan")
    batch = {"images_NCHW": torch.full((3, 1), world.rank), "embeddings_ND": embeddings}
    samples = [f"shard {world.rank}, sample {i}" for i in range(3)]
    outcomes = []
    for step in range(1, 7):
        guard.before_step([statistics])
        statistics += float("nan") if step != 3 else 1
        if step == 3:
            guard.passed()
            continue
        try:
            guard.failed(step, "loss nan", batch, samples)
            outcomes.append(str(statistics.tolist()))
        except NonFiniteError as error:
            outcomes.append(str(error))
            break
    return outcomes


def test_bad_steps_are_skipped_up_to_the_limit_in_a_row_named_and_kept(tmp_path: Path) -> None:
    for outcomes in run_on_ranks(meet_nan, 2, tmp_path):
        # steps 1 and 2 are skipped, 3 is good, 4 and 5 are skipped; 6 is the third in a row
        assert outcomes[:-1] == ["[1.0, 1.0]", "[1.0, 1.0]", "[2.0, 2.0]", "[2.0, 2.0]"]
        assert outcomes[-1].startswith(
            "step 6: loss nan; embeddings not finite on rank 1: 1 images, first shard 1, sample 2; "
            f"kept in {tmp_path}; more than engine.max_skipped_steps=2 in a row"
        )
    name = "step-00000001-rank-00001"
    assert load_file(tmp_path / f"{name}.safetensors")["images_NCHW"].tolist() == [[1]] * 3
    about = json.loads((tmp_path / f"{name}.json").read_text())
    assert about["not_finite"] == ["shard 1, sample 2"]
    assert len(about["samples"]) == 3


def skip_a_step(world: World, trees: dict[str, Tree]) -> list[str]:
    """Return what is wrong after a bad step: the next one has to give the weights of a run without it."""
    wrong = []
    for name, tree in trees.items():
        weights = []
        for steps in ((0, 1, 2), (0, 2)):
            config = from_dict(tree)
            state = build_state(config, world)
            step_function = build_step(state, config, world)
            for step in steps:
                weight = next(state.engine.module.parameters())
                hook = weight.register_hook(lambda gradient: gradient * float("nan"))
                if step != 1 or world.rank != world.size - 1:
                    hook.remove()
                if update(step_function, config, world, step).applied == (step == 1):
                    wrong.append(f"{name}: step {step}")
                hook.remove()
            weights.append(weights_of(state))
        with_it, without = weights
        wrong += [f"{name}: {part}" for part in with_it if not with_it[part].equal(without[part])]
    return wrong


def test_a_skipped_step_leaves_no_trace() -> None:
    """Neither in gradients that wait to be added to, nor in the count of micro-batches."""
    trees = {
        f"ZeRO {stage}, {accumulation} micro-batches": tree_of(
            engine__zero_stage=stage, engine__accumulation_steps=accumulation
        )
        for stage, accumulation in ((0, 1), (0, 3), (1, 1), (2, 3))
    }
    assert run_on_ranks(skip_a_step, 2, trees) == [[], []]
