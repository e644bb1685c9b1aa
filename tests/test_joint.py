"""The central proof: backbone in DeepSpeed plus head cut over ranks is one textbook model on one machine.

The reference keeps the whole K x D matrix and the whole global batch in one process, in float64, and uses
nothing but F.cross_entropy, torch's SGD or AdamW and clip_grad_norm_ over all parameters together. Compared
are losses, gradient norms and the weights after NUM_STEPS steps by a hard measure: the error relative to the
*distance travelled*, ||x - reference|| / ||reference - start||. SGD with momentum shows what AdamW would
hide: any factor on the gradient, such as the number of ranks, is a relative error of 0.5 or more.

The network has LayerNorm and no dropout, so micro-batches and ranks do not change what it computes.
Legend: N images of a rank, B of all, C classes of a rank, K of all, D width of the embedding.
"""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from ranks import run_on_ranks
from torch import Tensor

import trainer.joint
from trainer.backbone import build_backbone
from trainer.config import Config, from_dict
from trainer.distributed import World
from trainer.engine import build_engine, state_tensors
from trainer.head import ClassShard, initial_rows
from trainer.joint import JointStep, StepOutput
from trainer.optimizer import state_keys
from trainer.state import TrainState, build_state
from trainer.update import build_step

NUM_RANKS = [1, 2, 3]
BATCH = 36  # divisible by 3 ranks x 2 or 3 micro-batches
NUM_CLASSES = 101  # divisible by no number of ranks
NUM_STEPS = 3
LEARNING_RATES = [0.003, 0.001, 0.005]
CLIP_NORM = 20.0  # active in every step, which is checked
ZERO_STAGES = [0, 1, 2]

Tree = dict[str, Any]


def tree_of(**changes: Any) -> Tree:
    """Return a configuration; ``section__field=value`` changes it."""
    tree: Tree = {
        "seed": 3,
        "data": {"train": "none", "batch_size": BATCH},
        "backbone": {
            "name": "test_vit",
            "image_size": 32,
            "channels": 1,
            "neck": "linear",
            "embedding_dim": 16,
        },
        "head": {"num_classes": NUM_CLASSES, "scale": 8.0, "lr_multiplier": 4.0, "weight_decay": 1e-3},
        "optim": {
            "name": "sgd",
            "momentum": 0.9,
            "weight_decay": 0.01,
            "steps": NUM_STEPS,
            "clip_norm": None,
        },
        "engine": {"dtype": "float32"},
    }
    for name, value in changes.items():
        section, field = name.split("__")
        tree[section][field] = value
    return tree


VARIANTS = {
    "sgd": {},
    "sgd, 3 micro-batches, clipped": {"engine__accumulation_steps": 3, "optim__clip_norm": CLIP_NORM},
    "adamw, 2 micro-batches": {"engine__accumulation_steps": 2, "optim__name": "adamw"},
}
TREES = {
    f"ZeRO {stage}, {name}": tree_of(engine__zero_stage=stage, **changes)
    for stage, (name, changes) in product(ZERO_STAGES, VARIANTS.items())
}


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images_BCHW = torch.randint(256, (BATCH, 1, 32, 32), generator=generator, dtype=torch.uint8)
    return images_BCHW, torch.randint(NUM_CLASSES, (BATCH,), generator=generator)


def learning_rate(config: Config, step: int) -> float:
    return LEARNING_RATES[step] * (0.1 if config.optim.name == "adamw" else 1.0)


def update(step_function: JointStep, config: Config, world: World, step: int) -> StepOutput:
    images_N, labels_N = (x.chunk(world.size)[world.rank] for x in batch_of(step))
    return step_function(images_N, labels_N, learning_rate(config, step), step)


def weights_of(state: TrainState) -> dict[str, Tensor]:
    """Return the backbone's float32 weights as one vector, and this rank's rows."""
    backbone = [
        value.flatten() for name, value in state_tensors(state.engine) if name.startswith("parameter.")
    ]
    return {"backbone": torch.cat(backbone), "rows": state.head.centroids_CD.detach().clone()}


def train_on_rank(world: World, trees: dict[str, Tree]) -> dict[str, Any]:
    """Return losses, norms and weights of a run of every configuration, through the real engine."""
    # Whether half precision is *fast* here does not matter; DeepSpeed refuses it where it is not.
    get_accelerator().is_fp16_supported = lambda: True
    results = {}
    for name, tree in trees.items():
        config = from_dict(tree)
        state = build_state(config, world)
        start = weights_of(state)
        step_function = build_step(state, config, world)
        outputs = [update(step_function, config, world, step) for step in range(NUM_STEPS)]
        state.engine.eval()
        with torch.no_grad():
            embeddings_BD = state.engine(batch_of(0)[0]).float()
        results[name] = {
            "start": start,
            "end": weights_of(state),
            "loss": torch.stack([output.metrics["loss"] for output in outputs]),
            "accuracy": torch.stack([output.metrics["accuracy"] for output in outputs]),
            "grad_norm": torch.tensor([output.grad_norm for output in outputs]),
            "applied": [output.applied for output in outputs],
            "embeddings": embeddings_BD,
        }
    return results


def textbook(world: World, tree: Tree, dtype: torch.dtype) -> dict[str, Any]:
    """Train the same model in one process as a textbook would."""
    config = from_dict(tree)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, world.group).to(dtype)
    rows_KD = (
        initial_rows(config.seed, ClassShard(0, NUM_CLASSES, NUM_CLASSES), 16).to(dtype).requires_grad_()
    )
    weights = [*backbone.parameters(), rows_KD]
    groups = [
        {"params": [p for p in backbone.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in backbone.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [rows_KD], "weight_decay": 1e-3},
    ]
    if config.optim.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))

    def vectors() -> dict[str, Tensor]:
        flat = torch.cat([p.detach().flatten() for p in backbone.parameters()])
        return {"backbone": flat, "rows": rows_KD.detach().clone()}

    result: dict[str, Any] = {"start": vectors()}
    losses, norms = [], []
    for step in range(NUM_STEPS):
        for group, factor in zip(optimizer.param_groups, (1, 1, 4), strict=True):
            group["lr"] = learning_rate(config, step) * factor
        images_BCHW, labels_B = batch_of(step)
        z_BK = 8.0 * F.normalize(backbone(images_BCHW)) @ F.normalize(rows_KD).T
        loss = F.cross_entropy(z_BK, labels_B)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, config.optim.clip_norm or float("inf")))
        optimizer.step()
        losses.append(loss.detach())
    return {**result, "end": vectors(), "loss": torch.stack(losses), "grad_norm": torch.stack(norms)}


def reference_name(tree: Tree) -> str:
    return f"{tree['optim']['name']}, clip {tree['optim']['clip_norm']}"


def textbook_on_rank(world: World, trees: dict[str, Tree]) -> dict[str, dict[torch.dtype, Any]]:
    distinct = {reference_name(tree): tree for tree in trees.values()}
    return {
        name: {dtype: textbook(world, tree, dtype) for dtype in (torch.float64, torch.float32)}
        for name, tree in distinct.items()
    }


def joined(by_rank: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return one result from those of the ranks, after a check that they agree on all but the rows."""
    results = [result[name] for result in by_rank]
    first = results[0]
    for result in results:
        assert result["applied"] == first["applied"]
        for when, key in (("start", "backbone"), ("end", "backbone")):
            assert torch.equal(result[when][key], first[when][key]), (name, when)
        for key in ("loss", "accuracy", "grad_norm"):
            assert torch.equal(result[key], first[key]), (name, key)
    rows = {when: torch.cat([result[when]["rows"] for result in results]) for when in ("start", "end")}
    return {**first, **{when: {**first[when], "rows": rows[when]} for when in rows}}


def distance(found: dict[str, Any], reference: dict[str, Any], part: str) -> float:
    """Return the error of the final weights relative to how far training has moved them."""
    start, end = (reference[when][part].double() for when in ("start", "end"))
    return float((found["end"][part].double() - end).norm() / (end - start).norm())


@pytest.fixture(scope="module")
def references() -> dict[str, dict[torch.dtype, Any]]:
    return run_on_ranks(textbook_on_rank, 1, TREES)[0]


@pytest.fixture(scope="module", params=NUM_RANKS, ids=lambda n: f"{n} ranks")
def runs(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank has got, for every configuration."""
    return run_on_ranks(train_on_rank, request.param, TREES)


@pytest.mark.parametrize("name", TREES)
def test_training_is_that_of_a_textbook_in_one_process(
    name: str, runs: list[dict[str, Any]], references: dict[str, dict[torch.dtype, Any]]
) -> None:
    found = joined(runs, name)
    reference, float32 = references[reference_name(TREES[name])].values()
    assert found["applied"] == [True] * NUM_STEPS
    for part in ("backbone", "rows"):
        assert torch.equal(found["start"][part].double(), reference["start"][part])
        floor = distance(float32, reference, part)
        # What one process loses by float32 alone, with room for another order of sums: 2e-6 to 8e-6. With
        # AdamW 1e-3 for the backbone, since it makes steps out of rounding where a gradient is exactly 0
        # (the biases of attention's keys).
        assert distance(found, reference, part) < 3 * floor + 1e-6
    torch.testing.assert_close(found["loss"].double(), reference["loss"], rtol=3e-6, atol=0.0)
    torch.testing.assert_close(found["grad_norm"].double(), reference["grad_norm"], rtol=1e-5, atol=0.0)
    clip_norm = TREES[name]["optim"]["clip_norm"]
    assert clip_norm is None or bool((reference["grad_norm"] > clip_norm).all())


def train_without_the_rank_factor(world: World, trees: dict[str, Tree]) -> dict[str, Any]:
    trainer.joint.undo_rank_average = lambda embeddings_ND, group: embeddings_ND
    return train_on_rank(world, trees)


def test_the_measure_sees_a_missing_rank_factor(references: dict[str, dict[torch.dtype, Any]]) -> None:
    trees = {name: TREES[name] for name in ("ZeRO 0, sgd", "ZeRO 2, sgd")}
    by_rank = run_on_ranks(train_without_the_rank_factor, 2, trees)
    for name, tree in trees.items():
        reference = references[reference_name(tree)][torch.float64]
        assert distance(joined(by_rank, name), reference, "backbone") > 0.3


def build_with_backbones_of_their_own(world: World, tree: Tree) -> dict[str, Any]:
    """Hand the engine other weights on every rank, and take one plain SGD step."""
    config = from_dict(tree)
    torch.manual_seed(world.rank)
    engine = build_engine(config, build_backbone(config.backbone, world.group), world)
    backbone = torch.cat([p.detach().flatten() for p in engine.module.parameters()])

    state = build_state(config, world)
    before_CD = state.head.centroids_CD.detach().clone()
    gradients: list[Tensor] = []
    state.head.centroids_CD.register_hook(lambda gradient: gradients.append(gradient.clone()))
    update(build_step(state, config, world), config, world, 0)
    in_engine = {id(parameter) for parameter in state.engine.module.parameters()}
    return {
        "backbone": backbone,
        "before": before_CD,
        "gradient": gradients[0],
        "after": state.head.centroids_CD.detach().clone(),
        "head in engine": any(id(parameter) in in_engine for parameter in state.head.parameters()),
    }


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_the_engine_broadcasts_the_backbone_and_neither_broadcasts_nor_averages_the_head(
    zero_stage: int,
) -> None:
    tree = tree_of(engine__zero_stage=zero_stage, head__weight_decay=0.0, head__update="autograd")
    results = run_on_ranks(build_with_backbones_of_their_own, 2, tree)
    assert torch.equal(results[0]["backbone"], results[1]["backbone"])
    for rank, result in enumerate(results):
        own = ClassShard.of_rank(NUM_CLASSES, rank, 2)
        assert torch.equal(result["before"], initial_rows(tree["seed"], own, 16))
        # The rank's own gradient as autograd made it; averaged with the other's it would be another.
        expected_CD = result["before"] - LEARNING_RATES[0] * 4.0 * result["gradient"]
        torch.testing.assert_close(result["after"], expected_CD, rtol=1e-6, atol=1e-7)
        assert not result["head in engine"]
    assert (results[0]["before"][:50] - results[1]["before"][:50]).abs().min() > 0


FLOAT16 = {"fp16": {"initial_scale_power": 12, "hysteresis": 1}}  # 2^12, halved at the first overflow
BFLOAT16_TREES = {
    f"ZeRO {stage}": tree_of(engine__zero_stage=stage, engine__dtype="bfloat16") for stage in ZERO_STAGES
}
FLOAT16_TREES = {
    f"ZeRO {stage}": tree_of(
        engine__zero_stage=stage,
        engine__dtype="float16",
        engine__deepspeed_overrides=FLOAT16,
        head__update="autograd",
    )
    for stage in (1, 2)
}


@pytest.mark.parametrize(
    ("trees", "tolerances"),
    [
        # One rounding is 2^-9 = 2e-3 in bfloat16 and 2^-12 = 2e-4 in float16, where the weights too are
        # rounded, at every step (their float32 originals are compared). Measured: 6e-3, 5e-3; 4e-3, 1.2e-3.
        pytest.param(BFLOAT16_TREES, {"backbone": 0.03, "rows": 0.03}, id="bfloat16"),
        pytest.param(FLOAT16_TREES, {"backbone": 0.02, "rows": 0.006}, id="float16"),
    ],
)
def test_half_precision_stays_near_the_textbook(
    trees: dict[str, Tree], tolerances: dict[str, float], references: dict[str, dict[torch.dtype, Any]]
) -> None:
    by_rank = run_on_ranks(train_on_rank, 2, trees)
    for name, tree in trees.items():
        reference = references[reference_name(tree)][torch.float64]
        found = joined(by_rank, name)
        assert found["applied"] == [True] * NUM_STEPS
        for part, tolerance in tolerances.items():
            assert distance(found, reference, part) < tolerance, (name, part)
        torch.testing.assert_close(found["loss"].double(), reference["loss"], rtol=0.005, atol=0.0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_batch_norm_trains_and_evaluates_in_float16(num_ranks: int) -> None:
    """With statistics over all ranks and, on one rank, torch's own layers: in the network and in the neck."""
    trees = {
        f"{dtype}, {batch_norm}": tree_of(
            backbone__name="test_efficientnet",
            backbone__neck="bn_linear_bn",
            backbone__batch_norm=batch_norm,
            engine__dtype=dtype,
            engine__zero_stage=1,
            engine__deepspeed_overrides=FLOAT16 if dtype == "float16" else {},
        )
        for dtype, batch_norm in product(("float32", "float16"), ("global", "local"))
    }
    by_rank = run_on_ranks(train_on_rank, num_ranks, trees)
    for batch_norm in ("global", "local"):
        exact, half = (joined(by_rank, f"{dtype}, {batch_norm}") for dtype in ("float32", "float16"))
        assert half["applied"] == [True] * NUM_STEPS
        torch.testing.assert_close(half["loss"], exact["loss"], rtol=0.005, atol=0.0)
        # Running statistics of each rank's own images are each rank's own.
        same = [torch.equal(r[f"float16, {batch_norm}"]["embeddings"], half["embeddings"]) for r in by_rank]
        assert all(same) or batch_norm == "local"
        error = (half["embeddings"] - exact["embeddings"]).norm() / exact["embeddings"].norm()
        assert error < 0.01  # measured: 1e-3


def everything(state: TrainState) -> dict[str, Tensor]:
    """Return copies of all weights and optimizer states of backbone and head."""
    tensors = {name: value.clone() for name, value in state_tensors(state.engine)}
    for name, parameter in state.head.named_parameters():
        tensors[f"head.{name}"] = parameter.detach().clone()
        for key in state_keys(state.head_optimizer):
            tensors[f"head.{key}.{name}"] = state.head_optimizer.state[parameter][key].clone()
    return tensors


def poison(state: TrainState, part: str, value: float) -> Any:
    """Put ``value`` into one number of the part's gradient, on this rank; return the handle to undo it."""

    def hook(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[3] = value
        return spoiled

    of_backbone = list(state.engine.module.parameters())[2]
    return (of_backbone if part == "backbone" else state.head.centroids_CD).register_hook(hook)


def step_through_a_bad_gradient(world: World, cases: dict[str, tuple[Tree, str, float]]) -> dict[str, Any]:
    """Take a good step, one with a bad gradient on the last rank only, and, in float16, another good one."""
    get_accelerator().is_fp16_supported = lambda: True
    results = {}
    for name, (tree, part, value) in cases.items():
        config = from_dict(tree)
        state = build_state(config, world)
        step_function = build_step(state, config, world)
        outputs = [update(step_function, config, world, 0)]
        before = everything(state)
        scales = [float(getattr(state.engine.optimizer, "loss_scale", 1.0))]
        handle = poison(state, part, value) if world.rank == world.size - 1 else None
        outputs.append(update(step_function, config, world, 1))
        if handle is not None:
            handle.remove()
        after = everything(state)
        scales.append(float(getattr(state.engine.optimizer, "loss_scale", 1.0)))
        if config.engine.dtype == "float16":
            outputs.append(update(step_function, config, world, 2))
        end = everything(state)
        results[name] = {
            "applied": [output.applied for output in outputs],
            "losses": [float(output.metrics["loss"]) for output in outputs],
            "bad_norm": outputs[1].grad_norm,
            "changed": [key for key in before if not torch.equal(before[key], after[key])],
            "moved_later": [key for key in before if not torch.equal(after[key], end[key])],
            "weights": [key for key in before if key.startswith(("parameter.", "head."))],
            "finite": all(bool(torch.isfinite(value).all()) for value in end.values()),
            "scales": scales,
        }
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bad_gradient_on_one_rank_stops_every_rank_before_any_weight_moves(num_ranks: int) -> None:
    cases = {
        f"ZeRO {stage}, {value} in the {part}, {accumulation} micro-batches": (
            tree_of(
                engine__zero_stage=stage,
                engine__accumulation_steps=accumulation,
                head__update="fused" if part == "backbone" else "autograd",  # which has a gradient to spoil
            ),
            part,
            value,
        )
        for stage in ZERO_STAGES
        for part, value, accumulation in (("backbone", float("inf"), 1), ("head", float("nan"), 3))
    }
    by_rank = run_on_ranks(step_through_a_bad_gradient, num_ranks, cases)
    for name in cases:
        for result in (result[name] for result in by_rank):
            assert result["applied"] == [True, False], name
            assert result["changed"] == [], name
            assert not result["bad_norm"] < float("inf"), name  # inf or nan


def test_an_overflow_in_float16_on_one_rank_skips_that_step_on_all_and_halves_the_scale() -> None:
    cases = {
        f"{name}, {value} in the {part}": (tree, part, value)
        for name, tree in FLOAT16_TREES.items()
        for part, value in (("backbone", float("inf")), ("head", float("inf")), ("head", float("nan")))
    }
    by_rank = run_on_ranks(step_through_a_bad_gradient, 2, cases)
    for name in cases:
        for result in (result[name] for result in by_rank):
            assert result["applied"] == [True, False, True], name
            assert result["changed"] == [], name
            assert result["scales"] == [4096.0, 2048.0], name
            assert result["finite"]
            assert set(result["moved_later"]) >= set(result["weights"]), name
