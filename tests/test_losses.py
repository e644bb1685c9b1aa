"""Losses of whole batches against their formulas, written out image by image in one process, in float64.

Autograd differentiates the longhand sums; the classes of ``trainer/losses`` see float32, and only a part of
the images and of the classes on each rank. Legend: N images of a rank, B of all, C classes of a rank, K of
all, D width of the embedding.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from trainer.collectives import gather_labelled
from trainer.config import Config, from_dict
from trainer.distributed import World
from trainer.head import ClassShard, initial_rows
from trainer.losses.terms import build_term
from trainer.order import fold

NUM_RANKS = [1, 2, 3]
BATCH, DIM, NUM_CLASSES, SEED = 12, 5, 7, 4
LABELS = {
    "some absent, one alone": (0, 1, 2, 0, 1, 6, 0, 0, 4, 4, 2, 1),
    "one class": (3,) * BATCH,
    "no pair": (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4),
}
UNIT, RAW = "unit", "raw"
WEIGHTS = {"intra_weight": 1.5, "inter_weight": 0.2}

Formula = Callable[[Tensor, list[int], Tensor], Tensor]
"""(x_BD, labels, rows_KD), all float64 -> loss."""


def squared(a_D: Tensor, b_D: Tensor) -> Tensor:
    return ((a_D - b_D) ** 2).sum()


def points(x_BD: Tensor, features: str) -> list[Tensor]:
    return [x_D / x_D.norm() if features == UNIT else x_D for x_D in x_BD]


def mean(terms: list[Tensor], x_BD: Tensor) -> Tensor:
    return sum(terms, 0.0 * x_BD.sum()) / max(1, len(terms))


def center(features: str) -> Formula:
    def formula(x_BD: Tensor, labels: list[int], rows_KD: Tensor) -> Tensor:
        x = points(x_BD, features)
        return sum(squared(x[i], rows_KD[y]) for i, y in enumerate(labels)) / (2 * len(labels))

    return formula


def contrastive(features: str, margin: float) -> Formula:
    def formula(x_BD: Tensor, labels: list[int], rows_KD: Tensor) -> Tensor:
        x, terms = points(x_BD, features), []
        for i, j in product(range(len(x)), repeat=2):
            if i != j and labels[i] == labels[j]:
                terms.append(squared(x[i], x[j]) / 2)
            elif i != j:
                terms.append((margin - squared(x[i], x[j]).sqrt()).clamp(min=0) ** 2 / 2)
        return mean(terms, x_BD)

    return formula


def triplet(mining: str, features: str, margin: float) -> Formula:
    def formula(x_BD: Tensor, labels: list[int], rows_KD: Tensor) -> Tensor:
        x, everyone, terms = points(x_BD, features), range(len(labels)), []
        generator = torch.Generator().manual_seed(fold(SEED, 0) >> 1)
        uniform_BB = torch.rand(len(x), len(x), generator=generator, dtype=torch.float64)
        for a in everyone:
            d = [squared(x[a], x_D) for x_D in x]
            positives = [p for p in everyone if labels[p] == labels[a] and p != a]
            negatives = sorted((n for n in everyone if labels[n] != labels[a]), key=lambda n: float(d[n]))
            if mining == "batch_hard" and positives and negatives:
                terms.append((max(d[p] for p in positives) - min(d[n] for n in negatives) + margin).relu())
            for p in positives if mining != "batch_hard" else ():
                violating = [n for n in negatives if d[n] < d[p] + margin]
                beyond = [n for n in violating if d[n] > d[p]]
                if mining == "all":
                    terms += [(d[p] - d[n] + margin).relu() for n in negatives]
                elif mining == "random_violating" and violating:
                    n = violating[int(uniform_BB[a, p] * len(violating))]
                    terms.append(d[p] - d[n] + margin)
                elif mining == "semi_hard" and beyond:
                    terms.append(d[p] - d[beyond[0]] + margin)
        return mean(terms, x_BD)

    return formula


def coco_minibatch(scale: float) -> Formula:
    def formula(x_BD: Tensor, labels: list[int], rows_KD: Tensor) -> Tensor:
        present = sorted(set(labels))
        centroids = [mean([x_BD[i] for i, y in enumerate(labels) if y == k], x_BD) for k in present]
        terms = []
        for x_D, y in zip(x_BD, labels, strict=True):
            z = torch.stack([scale * x_D @ c_D / (x_D.norm() * c_D.norm()) for c_D in centroids])
            terms.append(z.exp().sum().log() - z[present.index(y)])
        return mean(terms, x_BD)

    return formula


def standalone(inter: str, offset: float = 0.0, exponent: float = 0.0) -> Formula:
    def formula(x_BD: Tensor, labels: list[int], rows_KD: Tensor) -> Tensor:
        everyone, classes = range(len(labels)), range(NUM_CLASSES)
        pulls = [squared(x_BD[i], rows_KD[labels[i]]) for i in everyone]
        if inter == "images":
            apart = mean([], x_BD)
            for i, j in product(everyone, repeat=2):
                if labels[i] != labels[j]:
                    apart = apart - torch.log(squared(x_BD[i], x_BD[j]) + offset) / len(labels)
        elif inter == "centres":
            pulls = [torch.exp(exponent * pull) for pull in pulls]
            apart = mean([], x_BD)
            for k, m in product(classes, repeat=2):
                if k != m:
                    apart = apart - torch.log(squared(rows_KD[k], rows_KD[m])) / NUM_CLASSES
        else:
            weight_KD = initial_rows(SEED + 1, ClassShard(0, NUM_CLASSES, NUM_CLASSES), DIM).double()
            z_KK = rows_KD @ weight_KD.T
            apart = mean([z.exp().sum().log() - z[k] for k, z in enumerate(z_KK)], x_BD)
        return 1.5 * mean(pulls, x_BD) + 0.2 * apart

    return formula


TERMS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    **{
        f"triplet {mining} {features}": (
            "triplet",
            {"mining": mining, "features": features, "margin": margin},
            triplet(mining, features, margin),
        )
        for mining in ("all", "random_violating", "semi_hard", "batch_hard")
        for features, margin in ((UNIT, 0.5), (RAW, 4.0))
    },
    "center raw": ("center", {}, center(RAW)),
    "center unit": ("center", {"features": UNIT}, center(UNIT)),
    "contrastive unit": ("contrastive", {"margin": 1.0}, contrastive(UNIT, 1.0)),
    "contrastive raw": ("contrastive", {"margin": 3.0, "features": RAW}, contrastive(RAW, 3.0)),
    "coco_minibatch": ("coco_minibatch", {}, coco_minibatch(3.0)),
    "standalone, text": ("standalone_center", WEIGHTS, standalone("images")),
    "standalone, code": ("standalone_center", {"log_offset": 1.0, **WEIGHTS}, standalone("images", 1.0)),
    "standalone, centres": (
        "standalone_center",
        {"inter": "centres", "exponent": 0.1, **WEIGHTS},
        standalone("centres", exponent=0.1),
    ),
    "standalone, classifier": (
        "standalone_center",
        {"inter": "classifier", **WEIGHTS},
        standalone("classifier"),
    ),
}


def config_of(loss: dict[str, Any], **sections: Any) -> Config:
    tree: dict[str, Any] = {"seed": SEED, "data": {"train": "none", "batch_size": BATCH}, "loss": loss}
    return from_dict({**tree, "head": {"num_classes": NUM_CLASSES, "scale": 3.0}, **sections})


def batch_of(labels: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return embeddings around a point per class, so that some triplets are violated and others are not."""
    generator = torch.Generator().manual_seed(seed)
    homes_KD = torch.randn(NUM_CLASSES, DIM, generator=generator)
    noise_BD = torch.randn(BATCH, DIM, generator=generator)
    lengths_B1 = torch.linspace(0.5, 2.0, BATCH)[:, None]
    return (homes_KD[list(labels)] + noise_BD) * lengths_B1, torch.tensor(labels)


def terms_on_a_rank(world: World, case: str) -> dict[str, Any]:
    """Return value and gradients of every term, of what this rank holds."""
    shard, results = ClassShard.of_rank(NUM_CLASSES, world.rank, world.size), {}
    for name, (term, numbers, _) in TERMS.items():
        config = config_of({"name": term, **({term: numbers} if numbers else {})})
        head = build_term(term, config, shard, DIM, world.group)
        embeddings_BD, labels_B = batch_of(LABELS[case])
        embeddings_ND = embeddings_BD.chunk(world.size)[world.rank].clone().requires_grad_()
        labels_N = labels_B.chunk(world.size)[world.rank]
        batch_BD, whole_labels_B = gather_labelled(embeddings_ND, labels_N, world.group)
        output = head.of_embeddings(batch_BD, whole_labels_B)
        output.loss.backward()  # through the gather, which adds up what the ranks' parts ask
        rows = [p for key, p in head.named_parameters() if key == "centres.rows_CD" and p.requires_grad]
        results[name] = {
            "loss": output.loss.detach(),
            "embeddings": embeddings_ND.grad,
            **({"rows": rows[0].grad} if rows else {}),
        }
    return results


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_value_and_gradients_of_every_term_are_those_of_its_formula(num_ranks: int, case: str) -> None:
    by_rank = run_on_ranks(terms_on_a_rank, num_ranks, case)
    embeddings_BD, labels_B = batch_of(LABELS[case])
    for name, (_, _, formula) in TERMS.items():
        x_BD = embeddings_BD.double().requires_grad_()
        rows_KD = initial_rows(SEED, ClassShard(0, NUM_CLASSES, NUM_CLASSES), DIM).double().requires_grad_()
        loss = formula(x_BD, labels_B.tolist(), rows_KD)
        gradients = torch.autograd.grad(loss, (x_BD, rows_KD), allow_unused=True)
        expected = dict(zip(("embeddings", "rows"), gradients, strict=True))
        results = [result[name] for result in by_rank]
        for result in results:
            assert torch.equal(result["loss"], results[0]["loss"]), name
            torch.testing.assert_close(result["loss"].double(), loss.detach(), rtol=2e-6, atol=1e-6)
        for key in results[0].keys() - {"loss"}:
            found = torch.cat([result[key] for result in results]).double()
            error = (found - expected[key]).norm() / expected[key].norm().clamp(min=1e-3)
            assert error < 5e-6, (name, key, float(error))  # float32; measured: up to 1e-6


def test_the_cases_hold_what_they_are_for() -> None:
    """Each mining chooses something of its own, and some hinge is at rest: else a wrong one would pass."""
    embeddings_BD, labels_B = batch_of(LABELS["some absent, one alone"])
    minings = ("all", "random_violating", "semi_hard", "batch_hard")
    for features, margin in ((UNIT, 0.5), (RAW, 4.0)):
        values = {
            float(triplet(m, features, margin)(embeddings_BD.double(), labels_B.tolist(), embeddings_BD))
            for m in minings
        }
        assert len(values) == len(minings)
        assert min(values) > 0.0
