"""Losses of whole batches against their formulas, written out image by image in one process, in float64.

Autograd differentiates the longhand sums; the classes of ``trainer/losses`` see float32, and only a part of
the images and of the classes on each rank. Legend: N images of a rank, B of all, C classes of a rank, K of
all, D width of the embedding.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor

from trainer.backbone import build_backbone
from trainer.checkpoint import head_tensors
from trainer.collectives import gather_labelled, sum_over
from trainer.config import Config, from_dict
from trainer.distributed import World
from trainer.errors import UserError
from trainer.evaluate import _classify
from trainer.head import ClassShard, initial_rows
from trainer.losses.terms import build_term
from trainer.options import load
from trainer.order import fold
from trainer.resume import resume
from trainer.saving import Checkpoints
from trainer.state import build_head, build_state, save
from trainer.update import build_step

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
        generator = torch.Generator().manual_seed(fold(SEED, 0, 0) >> 1)
        uniform_BB = torch.rand(len(x), len(x), generator=generator, dtype=torch.float64)
        for a in everyone:
            d = [squared(x[a], x_D) for x_D in x]
            positives = [p for p in everyone if labels[p] == labels[a] and p != a]
            negatives = sorted(
                (n for n in everyone if labels[n] != labels[a]), key=lambda n: float(d[n].detach())
            )
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


def standalone(
    inter: str, offset: float = 0.0, exponent: float = 0.0, weights: tuple[float, float] = (1.5, 0.2)
) -> Formula:
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
        return weights[0] * mean(pulls, x_BD) + weights[1] * apart

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


def terms_on_a_rank(world: World) -> dict[tuple[str, str], Any]:
    """Return value and gradients of every term, of what this rank holds."""
    shard, results = ClassShard.of_rank(NUM_CLASSES, world.rank, world.size), {}
    for case, (name, (term, numbers, _)) in product(LABELS, TERMS.items()):
        config = config_of({"name": term, **({term: numbers} if numbers else {})})
        head = build_term(term, config, shard, DIM, world.group)
        embeddings_BD, labels_B = batch_of(LABELS[case])
        embeddings_ND = embeddings_BD.chunk(world.size)[world.rank].clone().requires_grad_()
        labels_N = labels_B.chunk(world.size)[world.rank]
        batch_BD, whole_labels_B = gather_labelled(embeddings_ND, labels_N, world.group)
        output = head.of_embeddings(batch_BD, whole_labels_B)
        output.loss.backward()  # through the gather, which adds up what the ranks' parts ask
        rows = [p for key, p in head.named_parameters() if key == "centres.rows_CD" and p.requires_grad]
        results[case, name] = {
            "loss": output.loss.detach(),
            "embeddings": embeddings_ND.grad,
            **({"rows": rows[0].grad} if rows else {}),
        }
    return results


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_value_and_gradients_of_every_term_are_those_of_its_formula(num_ranks: int) -> None:
    by_rank = run_on_ranks(terms_on_a_rank, num_ranks)
    for case, (name, (_, _, formula)) in product(LABELS, TERMS.items()):
        embeddings_BD, labels_B = batch_of(LABELS[case])
        x_BD = embeddings_BD.double().requires_grad_()
        rows_KD = initial_rows(SEED, ClassShard(0, NUM_CLASSES, NUM_CLASSES), DIM).double().requires_grad_()
        loss = formula(x_BD, labels_B.tolist(), rows_KD)
        gradients = torch.autograd.grad(loss, (x_BD, rows_KD), allow_unused=True)
        expected = dict(zip(("embeddings", "rows"), gradients, strict=True))
        results = [result[case, name] for result in by_rank]
        for result in results:
            assert torch.equal(result["loss"], results[0]["loss"]), (case, name)
            torch.testing.assert_close(result["loss"].double(), loss.detach(), rtol=2e-6, atol=1e-6)
        for key in results[0].keys() - {"loss"}:
            found = torch.cat([result[key] for result in results]).double()
            error = (found - expected[key]).norm() / expected[key].norm().clamp(min=1e-3)
            assert error < 5e-6, (case, name, key, float(error))  # float32; measured: up to 1e-6


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


# Whole steps: the sum in the DeepSpeed step


# Means over images are those of two micro-batches; pairs would be other pairs.
SUMS: dict[str, tuple[int, dict[str, Any]]] = {
    "center": (2, {"name": "center", "center": {"weight": 0.3}}),
    "center, sgd": (2, {"name": "center", "center": {"weight": 0.3, "update": "sgd"}}),
    "coco, softmax, center": (2, {"name": "coco", "extra": {"softmax": 0.4, "center": 0.2}}),
    "standalone": (1, {"name": "standalone_center", "standalone_center": {"log_offset": 1.0}}),
}
LR, CLIP_NORM, NUM_STEPS = 0.004, 20.0, 3  # clips in every step, which is checked


def training_config(accumulation: int, loss: dict[str, Any]) -> Config:
    backbone = {"name": "test_vit", "image_size": 32, "channels": 1, "neck": "linear", "embedding_dim": DIM}
    return config_of(
        loss,
        backbone=backbone,
        optim={"steps": NUM_STEPS, "clip_norm": CLIP_NORM, "weight_decay": 0.0},
        engine={"dtype": "float32", "accumulation_steps": accumulation},
    )


def images_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images_BCHW = torch.randint(256, (BATCH, 1, 32, 32), generator=generator, dtype=torch.uint8)
    return images_BCHW, torch.randint(NUM_CLASSES, (BATCH,), generator=generator)


def train_on_rank(world: World) -> dict[str, Any]:
    results = {}
    for name, case in SUMS.items():
        config = training_config(*case)
        state = build_state(config, world)
        update, outputs = build_step(state, config, world), []
        for step in range(NUM_STEPS):
            images_N, labels_N = (x.chunk(world.size)[world.rank] for x in images_of(step))
            outputs.append(update(images_N, labels_N, LR, step))
        results[name] = {
            "loss": torch.stack([output.metrics["loss"] for output in outputs]),
            "grad_norm": torch.tensor([output.grad_norm for output in outputs]),
            "backbone": torch.cat([p.detach().flatten() for p in state.engine.module.parameters()]),
            "rows": {key: p.detach().clone() for key, p in state.head.named_parameters()},
        }
    return results


def textbook_on_rank(world: World) -> dict[str, Any]:
    """Train the same models in one process, in float64: whole matrices, one loss, one optimizer."""
    results = {}
    for name, case in SUMS.items():
        config = training_config(*case)
        torch.manual_seed(config.seed)
        backbone = build_backbone(config.backbone, world.group).double()
        start = torch.cat([p.detach().flatten() for p in backbone.parameters()])
        start_KD = initial_rows(SEED, ClassShard(0, NUM_CLASSES, NUM_CLASSES), DIM).double()
        softmax_KD, coco_KD, trained_KD = (start_KD.clone().requires_grad_() for _ in range(3))
        bias_K = torch.zeros(NUM_CLASSES, dtype=torch.float64, requires_grad=True)
        centres_KD = start_KD.clone()
        weights = [*backbone.parameters(), softmax_KD, coco_KD, trained_KD, bias_K]
        optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
        losses, norms = [], []
        for step in range(NUM_STEPS):
            images_BCHW, labels_B = images_of(step)
            x_BD, labels = backbone(images_BCHW), labels_B.tolist()
            softmax = F.cross_entropy(x_BD @ softmax_KD.T + bias_K, labels_B)
            coco = F.cross_entropy(3.0 * F.normalize(x_BD) @ F.normalize(coco_KD).T, labels_B)
            pull = center(RAW)(x_BD, labels, centres_KD)
            alone = standalone("images", 1.0, 0.0, weights=(1.0, 0.1))(x_BD, labels, trained_KD)
            loss = {
                "center": softmax + 0.3 * pull,
                "center, sgd": softmax + 0.3 * pull,
                "coco, softmax, center": coco + 0.4 * softmax + 0.2 * pull,
                "standalone": alone,
            }[name]
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM))
            optimizer.step()
            losses.append(loss.detach())
            for k in range(NUM_CLASSES):
                offsets = [centres_KD[k] - x_BD[i].detach() for i, y in enumerate(labels) if y == k]
                divisor = BATCH if name == "center, sgd" else 1 + len(offsets)
                centres_KD[k] -= 0.5 * sum(offsets, 0.0 * centres_KD[k]) / divisor
        results[name] = {
            "start": {"backbone": start, "rows": start_KD},
            "loss": torch.stack(losses),
            "grad_norm": torch.stack(norms),
            "backbone": torch.cat([p.detach().flatten() for p in backbone.parameters()]),
            "rows": {
                "parts.softmax.weight_CD": softmax_KD.detach(),
                "parts.softmax.bias_C": bias_K.detach(),
                "parts.coco.centroids_CD": coco_KD.detach(),
                "parts.center.centres.rows_CD": centres_KD,
                "parts.standalone_center.centres.rows_CD": trained_KD.detach(),
            },
        }
    return results


@pytest.fixture(scope="module")
def textbook() -> dict[str, Any]:
    return run_on_ranks(textbook_on_rank, 1)[0]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_steps_of_a_sum_are_those_of_a_textbook(num_ranks: int, textbook: dict[str, Any]) -> None:
    by_rank = run_on_ranks(train_on_rank, num_ranks)
    for name, expected in textbook.items():
        results = [result[name] for result in by_rank]
        for result in results:
            assert torch.equal(result["loss"], results[0]["loss"])
            torch.testing.assert_close(result["loss"].double(), expected["loss"], rtol=5e-6, atol=0.0)
            torch.testing.assert_close(
                result["grad_norm"].double(), expected["grad_norm"], rtol=1e-5, atol=0.0
            )
        assert expected["grad_norm"].min() > CLIP_NORM
        for key in results[0]["rows"]:
            found = torch.cat([result["rows"][key] for result in results]).double()
            start = expected["start"]["rows"] if found.ndim == 2 else 0.0
            error = (found - expected["rows"][key]).norm() / (expected["rows"][key] - start).norm()
            # Relative to how far the rows have moved. What one process loses by float32 alone: up to 7e-5.
            assert error < 2e-4, (name, key, float(error))
        travelled = (expected["backbone"] - expected["start"]["backbone"]).norm()
        for result in results:
            assert (result["backbone"] - expected["backbone"]).norm() / travelled < 3e-5, name


# Evaluation and checkpoints


ROWLESS_SUM = {"name": "triplet", "extra": {"contrastive": 0.5}}


def norms_on_a_rank(world: World, loss: dict[str, Any]) -> tuple[float, float]:
    head = build_head(config_of(loss), world, DIM)
    embeddings_BD, labels_B = batch_of(LABELS["some absent, one alone"])
    embeddings_ND = embeddings_BD.chunk(world.size)[world.rank].requires_grad_()
    (2.0 * head(embeddings_ND, labels_B.chunk(world.size)[world.rank]).loss).backward()
    return head.norm_bound(), float(sum_over(head.squared_norm(), world.group).sqrt())


@pytest.mark.parametrize("loss", [SUMS["coco, softmax, center"][1], {"extra": {"triplet": 3.0}}], ids=str)
def test_the_cheap_bound_of_a_sum_is_never_below_its_gradient_nor_far_above(loss: dict[str, Any]) -> None:
    for num_ranks in NUM_RANKS:
        for bound, exact in run_on_ranks(norms_on_a_rank, num_ranks, loss):
            assert exact <= bound < 8.0 * exact


def evaluate_on_rank(world: World) -> dict[str, dict[str, float]]:
    embeddings_BD, labels_B = batch_of(LABELS["some absent, one alone"])
    results = {}
    for loss in (ROWLESS_SUM, {"name": "center"}, {"name": "standalone_center"}):
        head = build_head(config_of(loss), world, DIM)
        results[loss["name"]] = _classify(embeddings_BD, labels_B, head)
    return results


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_every_loss_is_judged_by_nearest_centre(num_ranks: int) -> None:
    embeddings_BD, labels_B = batch_of(LABELS["some absent, one alone"])
    rows_KD = initial_rows(SEED, ClassShard(0, NUM_CLASSES, NUM_CLASSES), DIM)
    unit_BD = F.normalize(embeddings_BD)
    by_cosine = ((unit_BD @ F.normalize(rows_KD).T).argmax(1) == labels_B).float().mean()
    for result in run_on_ranks(evaluate_on_rank, num_ranks):
        for name, values in result.items():
            x_BD = unit_BD if name == "triplet" else embeddings_BD
            distance_BK = torch.stack([(x_BD - row_D).norm(dim=1) for row_D in rows_KD], dim=1)
            by_distance = float((distance_BK.argmin(1) == labels_B).float().mean())
            assert values["nearest_centre_euclidean"] == pytest.approx(by_distance)
            assert values["nearest_centre_cosine"] == pytest.approx(float(by_cosine))
            if name != "center":  # softmax judges there
                assert values["accuracy"] == pytest.approx(by_distance)
        assert result["center"]["accuracy"] != result["center"]["nearest_centre_euclidean"]


def save_and_load_on_rank(world: World, folder: Path, is_first: bool) -> dict[str, Tensor]:
    config = training_config(
        1, {**ROWLESS_SUM, "extra": {"coco": 1.0, "standalone_center": 0.1, "center": 0.0}}
    )
    checkpoints = Checkpoints(folder, 2, world.group)
    state = build_state(config, world)
    if is_first:
        images_N, labels_N = (x.chunk(world.size)[world.rank] for x in images_of(0))
        build_step(state, config, world)(images_N, labels_N, LR, 0)
        save(state, config, checkpoints, SimpleNamespace(fingerprint="data", class_names=()))
    else:
        resume(state, config, checkpoints, "data")
    return head_tensors(state.head, state.head_optimizer)


def test_a_sum_is_saved_and_cut_anew_for_another_number_of_ranks(tmp_path: Path) -> None:
    saved, loaded = (run_on_ranks(save_and_load_on_rank, n, tmp_path, n == 2) for n in (2, 3))
    assert saved[0].keys() == loaded[0].keys()
    frozen = "parts.center.centres.rows_CD"
    assert f"parameter.{frozen}" in saved[0]
    assert f"optimizer.momentum_buffer.{frozen}" not in saved[0]
    for key in saved[0]:
        assert torch.equal(torch.cat([r[key] for r in saved]), torch.cat([r[key] for r in loaded])), key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.extra={softmax: 1}", "loss.name=center"],
            "loss.extra.softmax: is a part of loss.name=center",
        ),
        (["loss.extra={coco: 1}"], "loss.extra.coco: is a part of loss.name=coco already"),
        (["loss.extra={triplet: 0}"], "loss.extra.triplet: 0 has no effect"),
        (["loss.extra={triplett: 1}"], "loss.extra"),
        (["loss.triplet.mining=hardest"], "loss.triplet.mining: "),
        (["loss.triplet.margn=1"], "loss.triplet.margn: unknown field; did you mean loss.triplet.margin"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, ["data.train=none", "optim.steps=1", *overrides])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
