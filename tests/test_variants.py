"""What may be added to the head's softmax, against float64 longhand: value, gradients and training.

Sub-centroids, label smoothing, a learned scale, one threshold for all classes (UniFace), a sample of the
classes. On 1, 2 and 3 ranks, with the fused head and with an ordinary gradient. Legend: see trainer/head.py;
S rows of a class.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_on_ranks
from trainer.collectives import sum_over
from trainer.distributed import World
from trainer.fused import FusedCocoHead
from trainer.head import ClassShard, CocoHead, SoftmaxHead, initial_rows
from trainer.margins import build_margin
from trainer.optimizer import allocate_state
from trainer.passes import drawn_classes

NUM_CLASSES, DIM, BATCH, STEPS, SCALE, RATE = 23, 6, 12, 4, 9.0, 0.2


@dataclass(frozen=True)
class Case:
    loss: str = "coco"
    numbers: dict[str, float] = field(default_factory=dict)
    sub_centroids: int = 1
    label_smoothing: float = 0.0
    sample_rate: float = 1.0
    fused_only: bool = False


CASES = {
    "sub-centroids": Case(sub_centroids=3),
    "sub-centroids and a margin": Case(loss="arcface", numbers={"margin": 0.3}, sub_centroids=2),
    "sub-centroids and hard negatives": Case(
        loss="curricularface", numbers={"margin": 0.3, "momentum": 0.5}, sub_centroids=2
    ),
    "label smoothing": Case(label_smoothing=0.3),
    "label smoothing and a margin": Case(loss="cosface", numbers={"margin": 0.2}, label_smoothing=0.1),
    "learned scale": Case(loss="normface", numbers={"rate": 2.0}),
    "one threshold": Case(loss="uniface", numbers={"rate": 0.5, "weight": 0.7}),
    "one threshold and sub-centroids": Case(loss="uniface", sub_centroids=2),
    "sampled": Case(sample_rate=0.3, fused_only=True),
    "sampled with a margin and a learned scale": Case(loss="normface", sample_rate=0.5, fused_only=True),
}
MARGIN_OF_TARGET = {"arcface": 0.3, "cosface": 0.2, "uniface": 0.4}


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    embeddings_BD = 3.0 * torch.randn(BATCH, DIM, generator=generator)
    labels_B = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
    labels_B[:3] = torch.tensor([0, NUM_CLASSES - 1, 0])  # the ends of the shards, and a class twice
    return embeddings_BD, labels_B


def head_of(case: Case, update: str, world: World, **more: Any) -> CocoHead:
    shard = ClassShard.of_rank(NUM_CLASSES, world.rank, world.size)
    loss = build_margin(case.loss, SCALE, 0, num_classes=NUM_CLASSES, **case.numbers)
    settings: dict[str, Any] = {
        "loss": loss,
        "seed": 3,
        "group": world.group,
        "sub_centroids": case.sub_centroids,
        "label_smoothing": case.label_smoothing,
    }
    if update == "fused":
        # Several tiles, of which some are kept and some are computed again.
        settings |= {"tile_rows": 4, "cache_bytes": 300, "sample_rate": case.sample_rate}
        return FusedCocoHead(shard, DIM, **settings, **more)
    return CocoHead(shard, DIM, **settings, **more)


def train_on_a_rank(world: World, names: list[str]) -> dict[tuple[str, str], list[Tensor]]:
    found = {}
    for name in names:
        for update in ("fused",) if CASES[name].fused_only else ("fused", "autograd"):
            found[name, update] = train_one(world, CASES[name], update)
    return found


def train_one(world: World, case: Case, update: str) -> list[Tensor]:
    head = head_of(case, update, world)
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE, momentum=0.9)
    allocate_state(optimizer)
    losses, gradients = [], []
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for step in range(STEPS):
        embeddings_BD, labels_B = batch_of(step)
        embeddings_ND = embeddings_BD[own].requires_grad_()
        head.begin_step(step)
        output = head(embeddings_ND, labels_B[own])
        output.loss.backward()
        head.update(optimizer, divisor=1.0, step=step)
        head.end_step()
        losses.append(output.loss.detach())
        gradients.append(embeddings_ND.grad)
    learned = torch.stack(
        [value.double() for _, value in sorted(head.loss.state_dict().items())] or [torch.ones(())]
    )
    return [torch.stack(losses), torch.cat(gradients), head.centroids_CD.detach(), learned]


@functools.cache
def found_on(num_ranks: int) -> dict[tuple[str, str], list[Tensor]]:
    """Every case on so many ranks, rows and embedding gradients put together (the gradients per step)."""
    ranks = run_on_ranks(train_on_a_rank, num_ranks, list(CASES))
    whole = {}
    for key in ranks[0]:
        losses, _, _, learned = ranks[0][key]
        by_step = [r[key][1].view(STEPS, -1, DIM) for r in ranks]
        whole[key] = [losses, torch.cat(by_step, 1), torch.cat([r[key][2] for r in ranks]), learned]
        for other in ranks[1:]:  # what is replicated is equal to the bit
            assert torch.equal(other[key][0], losses)
            assert torch.equal(other[key][3], learned)
    return whole


def target_logit(case: Case, cosine: Tensor, scale: Tensor) -> Tensor:
    margin = MARGIN_OF_TARGET.get(case.loss, 0.0)
    if case.loss in ("arcface", "curricularface"):
        return scale * torch.cos(torch.acos(cosine) + 0.3)
    return scale * (cosine - margin)


def longhand(
    case: Case, rows_KSD: Tensor, embeddings_BD: Tensor, labels_B: Tensor, now: dict[str, Any]
) -> Tensor:
    """Return the mean loss, image by image and class by class, as the formulas are printed."""
    losses = []
    scale = now["scale"]
    own_cosines = []
    for i, label in enumerate(labels_B.tolist()):
        feature_D = embeddings_BD[i] / embeddings_BD[i].norm()
        cosines = {}
        for k in range(NUM_CLASSES):
            if case.sample_rate == 1.0 or k in now["taking_part"]:
                each = [row_D @ feature_D / row_D.norm() for row_D in rows_KSD[k]]
                cosines[k] = max(each, key=lambda cosine: cosine.item())
        own_cosines.append(cosines[label])
        now["rows"].append(cosines)
    for i, label in enumerate(labels_B.tolist()):
        cosines = now["rows"][i]
        logits = {k: scale * c for k, c in cosines.items()}
        if case.loss == "curricularface":
            t = 0.5 * now["t"] + 0.5 * sum(c.item() for c in own_cosines) / BATCH
            hard = scale * math.cos(math.acos(float(cosines[label])) + 0.3)
            logits = {k: z * (t + z / scale) if float(z) > hard else z for k, z in logits.items()}
        logits[label] = target_logit(case, cosines[label], scale)
        if case.loss == "uniface":
            weight, bias = case.numbers.get("weight", 1.0), now["bias"]
            loss = torch.log1p(torch.exp(bias - logits[label]))
            for k, z in logits.items():
                if k != label:
                    loss = loss + weight * torch.log1p(torch.exp(z - bias))
        else:
            total = sum(torch.exp(z) for z in logits.values())
            smooth = case.label_smoothing
            wanted = {k: smooth / NUM_CLASSES + (1.0 - smooth) * (k == label) for k in logits}
            loss = -sum(wanted[k] * torch.log(torch.exp(z) / total) for k, z in logits.items() if wanted[k])
        losses.append(loss)
    if case.loss == "curricularface":
        now["t"] = 0.5 * now["t"] + 0.5 * sum(c.item() for c in own_cosines) / BATCH
    return torch.stack(losses).mean()


@functools.cache
def expected(name: str) -> list[Tensor]:
    case = CASES[name]
    many = case.sub_centroids
    whole = ClassShard.of_rank(NUM_CLASSES, 0, 1).times(many)
    rows = initial_rows(3, whole, DIM).double().view(NUM_CLASSES, many, DIM)
    momentum = torch.zeros_like(rows)
    now: dict[str, Any] = {
        "scale": torch.tensor(SCALE, dtype=torch.float64),
        "bias": torch.tensor(math.log(10.0 * NUM_CLASSES), dtype=torch.float64),
        "t": 0.0,
    }
    losses, gradients = [], []
    for step in range(STEPS):
        embeddings_BD, labels_B = batch_of(step)
        drawn = drawn_classes(3, step, 0, NUM_CLASSES, case.sample_rate)
        now |= {"rows": [], "taking_part": {*drawn.nonzero()[0].tolist(), *labels_B.tolist()}}
        rows, embeddings_BD = rows.detach().requires_grad_(), embeddings_BD.double().requires_grad_()
        now["scale"], now["bias"] = (now[key].detach().requires_grad_() for key in ("scale", "bias"))
        loss = longhand(case, rows, embeddings_BD, labels_B, now)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(embeddings_BD.grad)
        taking = sorted(now["taking_part"]) if case.sample_rate < 1.0 else list(range(NUM_CLASSES))
        with torch.no_grad():
            momentum[taking] = 0.9 * momentum[taking] + rows.grad[taking]
            rows = rows.index_put((torch.tensor(taking),), rows[taking] - RATE * momentum[taking])
            if case.loss == "normface":
                now["scale"] = now["scale"] - case.numbers.get("rate", 1.0) * now["scale"].grad
            if case.loss == "uniface":
                now["bias"] = now["bias"] - case.numbers.get("rate", 0.1) * now["bias"].grad
    learned = {"normface": now["scale"], "uniface": now["bias"], "curricularface": torch.tensor(now["t"])}
    learned_1 = learned.get(case.loss, torch.ones(())).detach().double().view(1)
    return [torch.stack(losses), torch.stack(gradients), rows.detach().flatten(0, 1), learned_1]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_formula_in_float64(name: str, num_ranks: int) -> None:
    for update in ("fused",) if CASES[name].fused_only else ("fused", "autograd"):
        losses, gradients, rows, learned = found_on(num_ranks)[name, update]
        wanted = expected(name)
        assert error(losses, wanted[0]) < 1e-6, update
        assert error(gradients, wanted[1]) < 2e-6, update
        assert error(rows, wanted[2]) < 2e-6, update
        assert error(learned, wanted[3]) < 1e-6, update


def test_the_learned_numbers_have_moved() -> None:
    assert abs(float(expected("learned scale")[3]) - SCALE) > 0.1
    assert abs(float(expected("one threshold")[3]) - math.log(10.0 * NUM_CLASSES)) > 0.1


def test_a_sample_is_a_function_of_seed_step_and_class() -> None:
    whole = drawn_classes(1, 5, 0, 200_000, 0.1)
    assert abs(whole.mean() - 0.1) < 0.003
    part = drawn_classes(1, 5, 65_000, 140_001, 0.1)
    assert (part == whole[65_000:140_001]).all()
    assert (drawn_classes(1, 6, 0, 200_000, 0.1) != whole).any()
    assert (drawn_classes(2, 5, 0, 200_000, 0.1) != whole).any()


def rows_after_sampled_steps(world: World, row_type: torch.dtype) -> tuple[Tensor, Tensor]:
    head = head_of(Case(sample_rate=0.3), "fused", world, row_type=row_type)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    allocate_state(optimizer)
    before = head.centroids_CD.detach().clone()
    embeddings_BD, labels_B = batch_of(0)
    head.begin_step(0)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    head(embeddings_BD[own].requires_grad_(), labels_B[own]).loss.backward()
    head.update(optimizer, divisor=1.0, step=0)
    head.end_step()
    evaluated = head.of_embeddings(embeddings_BD, labels_B).loss.detach()
    return (head.centroids_CD.detach() != before).any(1), evaluated


@pytest.mark.parametrize("row_type", [torch.float32, torch.bfloat16])
def test_only_sampled_rows_move_and_evaluation_sees_all(row_type: torch.dtype) -> None:
    ranks = run_on_ranks(rows_after_sampled_steps, 2, row_type)
    moved = torch.cat([moved for moved, _ in ranks])
    drawn = torch.from_numpy(drawn_classes(3, 0, 0, NUM_CLASSES, 0.3))
    drawn[batch_of(0)[1]] = True
    assert moved.tolist() == drawn.tolist()
    assert 0 < drawn.sum() < NUM_CLASSES
    assert float(ranks[0][1]) > 0.0


def rows_of_early_updates(world: World, early: bool) -> list[Tensor]:
    head = head_of(Case(loss="arcface", numbers={"margin": 0.3}), "fused", world)
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE, momentum=0.9)
    allocate_state(optimizer)
    norms = []
    for step in range(3):
        embeddings_BD, labels_B = batch_of(step)
        loss = head.of_embeddings(embeddings_BD.requires_grad_(), labels_B).loss
        before = head.centroids_CD.detach().clone()
        if early and step != 1:
            head.update_in_backward(optimizer, step)
        loss.backward()
        assert torch.equal(before, head.centroids_CD) != (early and step != 1)
        norms.append(head.update(optimizer, divisor=1.0, step=step))
        head.end_step()
    return [head.centroids_CD.detach(), *norms]


def test_an_update_within_the_backward_pass_is_the_same_update() -> None:
    for late, early in zip(*(run_on_ranks(rows_of_early_updates, 2, early) for early in (0, 1)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(late, early, strict=True))


def norms_on_a_rank(world: World, name: str) -> list[tuple[float, float]]:
    case = CASES.get(name, Case(loss=name))
    head = head_of(case, "fused", world)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    found = []
    for step in range(3):
        embeddings_BD, labels_B = batch_of(step)
        for part in range(1 + (case.sample_rate == 1.0)):  # micro-batches
            embeddings_ND = (embeddings_BD[own] + part).requires_grad_()
            (2.0 * head(embeddings_ND, labels_B[own]).loss).backward()
        exact = float(sum_over(head.squared_norm(), world.group).sqrt())
        found.append((head.norm_bound(), exact))
        head.end_step()
    return found


@pytest.mark.parametrize("name", ["coco", "arcface", "magface", "adacos", "sub-centroids", "sampled"])
def test_the_cheap_bound_of_the_gradient_is_never_below_it_nor_far_above(name: str) -> None:
    for num_ranks in (1, 3):
        for bound, exact in run_on_ranks(norms_on_a_rank, num_ranks, name)[0]:
            assert exact <= bound < 8.0 * exact


def unseen_on_a_rank(world: World, kind: str) -> list[int]:
    shard = ClassShard.of_rank(NUM_CLASSES, world.rank, world.size)
    head = (
        SoftmaxHead(shard, DIM, seed=0, group=world.group)
        if kind == "softmax"
        else head_of(Case(), kind, world)
    )
    counts = []
    for step in range(40, 44):
        head.begin_step(step)
        labels_B = torch.arange(step % 2, NUM_CLASSES, 2)[:10]
        head.of_embeddings(torch.ones(10, DIM).requires_grad_(), labels_B).loss.backward()
        with torch.no_grad():  # an evaluation is not training
            head.of_embeddings(torch.ones(NUM_CLASSES, DIM), torch.arange(NUM_CLASSES))
        head.end_step()
        counts.append(int(head.num_dead(2)))
    return counts


@pytest.mark.parametrize("kind", ["fused", "autograd", "softmax"])
def test_classes_without_a_sample_for_some_steps_are_counted_over_all_ranks(kind: str) -> None:
    # Steps 40, 42 bring classes 0, 2, .. 18, steps 41, 43 classes 1, 3, .. 19; classes 20, 21, 22 never come.
    assert run_on_ranks(unseen_on_a_rank, 3, kind) == [[0, 0, 3, 3]] * 3
