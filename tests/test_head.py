"""The class-parallel heads against float64 loops over all classes.

Legend: N images of a rank, B of all, C classes of a rank, K of all, D width of the embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor

from trainer.distributed import World
from trainer.head import ClassShard, CocoHead, SoftmaxHead, initial_centroids, initial_rows
from trainer.margins import CosineSoftmax

NUM_RANKS = [1, 2, 3]
DIM = 16
BATCH = 12  # divisible by every number of ranks


@dataclass(frozen=True)
class Case:
    num_classes: int
    scale: float
    labels_B: tuple[int, ...]
    near: float = 0.0
    """Added share of the own centroid: 6 gives a loss of 0.03 at scale 64, as late in training."""


CASES = {
    "not divisible, every class once or twice": Case(7, 4.0, (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4)),
    "as many classes as the most ranks": Case(3, 4.0, (0, 1, 2, 2, 1, 0, 0, 0, 1, 1, 2, 2)),
    "labels all on the first rank": Case(10, 7.4, (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2)),
    "labels all on the last rank": Case(101, 10.5, (100, 99, 98, 100, 99, 98, 97, 97, 100, 99, 98, 90)),
    "one label for the whole batch": Case(10, 7.4, (4,) * BATCH),
    "scale 64, random embeddings": Case(101, 64.0, tuple(range(0, 101, 9))),
    "scale 64, embeddings at their centroids": Case(101, 64.0, tuple(range(0, 101, 9)), near=6.0),
}


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Return B x D embeddings of all lengths (0.1 to 10) and their labels."""
    generator = torch.Generator().manual_seed(case.num_classes)
    labels_B = torch.tensor(case.labels_B)
    embeddings_BD = torch.randn(BATCH, DIM, generator=generator)
    embeddings_BD += case.near * rows_of(case.num_classes)[labels_B]
    return embeddings_BD * torch.logspace(-1, 1, BATCH)[:, None], labels_B


def rows_of(num_classes: int) -> Tensor:
    """Return K x D rows of lengths 0.5 to 2."""
    generator = torch.Generator().manual_seed(1000 + num_classes)
    rows_KD = torch.randn(num_classes, DIM, generator=generator) / DIM**0.5
    return rows_KD * torch.linspace(0.5, 2.0, num_classes)[:, None]


def biases_of(num_classes: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, num_classes)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def oracle(
    z: list[list[float]], labels: list[int], scale: float
) -> tuple[dict[str, float], list[list[float]]]:
    """Return loss and metrics of B x K logits, and dL/dz, as the formulas are written."""
    loss = accuracy = target = other = 0.0
    slope = []
    for z_i, y in zip(z, labels, strict=True):
        others = max(z_ik for k, z_ik in enumerate(z_i) if k != y)
        shift = max(z_i)
        partition = sum(math.exp(z_ik - shift) for z_ik in z_i)
        loss += (math.log(partition) + shift - z_i[y]) / len(z)
        accuracy += (z_i[y] > others) / len(z)
        target += z_i[y] / scale / len(z)
        other += others / scale / len(z)
        slope.append([(math.exp(z_ik - shift) / partition - (k == y)) / len(z) for k, z_ik in enumerate(z_i)])
    metrics = {"loss": loss, "accuracy": accuracy, "cosine_target": target, "cosine_nearest_other": other}
    return metrics, slope


def accuracy_by_direction(case: Case) -> float:
    """Return the share of the batch whose own row has a smaller angle to it than every other row."""
    embeddings_BD, labels_B = batch_of(case)
    f, w = embeddings_BD.double().tolist(), rows_of(case.num_classes).double().tolist()
    cosine = [[dot(f_i, w_k) / math.hypot(*f_i) / math.hypot(*w_k) for w_k in w] for f_i in f]
    is_right = [
        all(row[y] > x for k, x in enumerate(row) if k != y)
        for row, y in zip(cosine, labels_B.tolist(), strict=True)
    ]
    return sum(is_right) / len(is_right)


def coco_oracle(case: Case) -> dict[str, Any]:
    """Loss, metrics, dL/df and dL/dc by loops in float64, with the tangent projections written out."""
    embeddings_BD, labels_B = batch_of(case)
    f, c = embeddings_BD.double().tolist(), rows_of(case.num_classes).double().tolist()
    f_length = [math.sqrt(dot(f_i, f_i)) for f_i in f]
    c_length = [math.sqrt(dot(c_k, c_k)) for c_k in c]
    cosine = [
        [dot(f_i, c_k) / (f_length[i] * c_length[k]) for k, c_k in enumerate(c)] for i, f_i in enumerate(f)
    ]
    z = [[case.scale * cosine_ik for cosine_ik in row] for row in cosine]
    metrics, slope = oracle(z, labels_B.tolist(), case.scale)
    f_gradient = [[0.0] * DIM for _ in f]
    c_gradient = [[0.0] * DIM for _ in c]
    for i in range(len(f)):
        for k in range(len(c)):
            for d in range(DIM):
                f_unit, c_unit = f[i][d] / f_length[i], c[k][d] / c_length[k]
                g = case.scale * slope[i][k]
                f_gradient[i][d] += g * (c_unit - cosine[i][k] * f_unit) / f_length[i]
                c_gradient[k][d] += g * (f_unit - cosine[i][k] * c_unit) / c_length[k]
    return {"metrics": metrics, "embeddings": f_gradient, "rows": c_gradient}


def softmax_oracle(case: Case, has_bias: bool) -> dict[str, Any]:
    embeddings_BD, labels_B = batch_of(case)
    f, w = embeddings_BD.double().tolist(), rows_of(case.num_classes).double().tolist()
    bias = (has_bias * biases_of(case.num_classes)).double().tolist()
    z = [[dot(f_i, w_k) + bias[k] for k, w_k in enumerate(w)] for f_i in f]
    metrics, slope = oracle(z, labels_B.tolist(), 1.0)
    f_gradient = [
        [sum(slope[i][k] * w[k][d] for k in range(len(w))) for d in range(DIM)] for i in range(len(f))
    ]
    w_gradient = [
        [sum(slope[i][k] * f[i][d] for i in range(len(f))) for d in range(DIM)] for k in range(len(w))
    ]
    b_gradient = [sum(slope[i][k] for i in range(len(f))) for k in range(len(w))]
    metrics = {name: metrics[name] for name in ("loss", "accuracy")}
    gradients = {"embeddings": f_gradient, "rows": w_gradient, "biases": b_gradient}
    return {"metrics": metrics, **{name: g for name, g in gradients.items() if has_bias or name != "biases"}}


def on_a_rank(world: World, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Return what all three heads make of this rank's part of each case."""
    results: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        shard = ClassShard.of_rank(case.num_classes, world.rank, world.size)
        own = slice(shard.start, shard.stop)
        rows_CD = rows_of(case.num_classes)[own]
        coco = CocoHead(shard, DIM, loss=CosineSoftmax(case.scale), seed=0, group=world.group)
        coco.centroids_CD.data.copy_(rows_CD)
        softmax = SoftmaxHead(shard, DIM, seed=0, group=world.group)
        softmax.weight_CD.data.copy_(rows_CD)
        softmax.bias_C.data.copy_(biases_of(case.num_classes)[own])
        unbiased = SoftmaxHead(shard, DIM, seed=0, group=world.group, has_bias=False)
        unbiased.weight_CD.data.copy_(rows_CD)
        embeddings_BD, labels_B = batch_of(case)
        for kind, head in (("coco", coco), ("softmax", softmax), ("unbiased", unbiased)):
            embeddings_ND = embeddings_BD.chunk(world.size)[world.rank].clone().requires_grad_()
            output = head(embeddings_ND, labels_B.chunk(world.size)[world.rank])
            output.loss.backward()
            whole = head.of_embeddings(embeddings_BD, labels_B)
            # Not to the bit: what was gathered lies in memory with other strides, and BLAS adds otherwise.
            torch.testing.assert_close(whole.loss, output.loss, rtol=2e-6, atol=1e-5)
            for key, value in whole.metrics.items():
                torch.testing.assert_close(value, output.metrics[key], rtol=2e-6, atol=1e-6)
            assert not any(value.requires_grad for value in output.metrics.values())
            assert torch.equal(head.directions_CD(), F.normalize(rows_CD))
            by_direction = head.accuracy_by_direction(embeddings_BD, labels_B)
            first, *others = [p.grad for p in head.parameters()]
            results[f"{kind}: {name}"] = {
                "metrics": {"loss": output.loss.detach(), **output.metrics},
                "embeddings": embeddings_ND.grad,
                "rows": first,
                "accuracy by direction": by_direction,
                **({"biases": others[0]} if others else {}),
            }
    return results


@pytest.fixture(scope="module")
def oracles() -> dict[str, dict[str, Any]]:
    return {
        **{f"coco: {name}": coco_oracle(case) for name, case in CASES.items()},
        **{f"softmax: {name}": softmax_oracle(case, has_bias=True) for name, case in CASES.items()},
        **{f"unbiased: {name}": softmax_oracle(case, has_bias=False) for name, case in CASES.items()},
    }


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_loss_metrics_and_gradients_are_those_of_loops_over_all_classes(
    num_ranks: int, oracles: dict[str, dict[str, Any]]
) -> None:
    by_rank = run_on_ranks(on_a_rank, num_ranks, CASES)
    for name, expected in oracles.items():
        results = [result[name] for result in by_rank]
        for result in results:
            assert result["metrics"].keys() == expected["metrics"].keys()
            # The loss is the same number on every rank, to the bit.
            assert torch.equal(result["metrics"]["loss"], results[0]["metrics"]["loss"])
            for key, value in expected["metrics"].items():
                # float32 logits up to 64 are known to 4e-6; a loss near 0 is a difference of two of them.
                assert float(result["metrics"][key]) == pytest.approx(value, rel=2e-6, abs=1e-5), (name, key)
            assert float(result["accuracy by direction"]) == pytest.approx(
                accuracy_by_direction(CASES[name.partition(": ")[2]])
            )
        for key in expected.keys() - {"metrics"}:
            found = torch.cat([result[key] for result in results]).double()
            wanted = torch.tensor(expected[key], dtype=torch.float64)
            error = (found - wanted).norm() / wanted.norm()
            # A plain float32 F.cross_entropy of the whole matrices is off by up to 9e-7.
            assert error < 3e-6, (name, key, float(error))


def tangents_on_a_rank(world: World) -> list[float]:
    case = CASES["not divisible, every class once or twice"]
    shard = ClassShard.of_rank(case.num_classes, world.rank, world.size)
    head = CocoHead(shard, DIM, loss=CosineSoftmax(case.scale), seed=0, group=world.group)
    embeddings_BD, labels_B = batch_of(case)
    embeddings_ND = embeddings_BD.chunk(world.size)[world.rank].clone().requires_grad_()
    head(embeddings_ND, labels_B.chunk(world.size)[world.rank]).loss.backward()
    return [
        float(F.cosine_similarity(x.detach(), x.grad).abs().max()) for x in (embeddings_ND, head.centroids_CD)
    ]


def test_gradients_of_coco_are_tangent_to_the_spheres_of_embeddings_and_centroids() -> None:
    for cosines in run_on_ranks(tangents_on_a_rank, 2):
        assert max(cosines) < 1e-5


def test_class_shards_cover_all_classes_once_in_order_and_none_is_empty() -> None:
    for num_classes in (1, 2, 3, 7, 10, 101, 1000):
        for num_ranks in range(1, min(num_classes, 13) + 1):
            shards = [ClassShard.of_rank(num_classes, rank, num_ranks) for rank in range(num_ranks)]
            assert [k for shard in shards for k in range(shard.start, shard.stop)] == list(range(num_classes))
            sizes = [len(shard) for shard in shards]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert {shard.num_classes for shard in shards} == {num_classes}


def test_more_ranks_than_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 classes cannot be cut over 4 ranks"):
        ClassShard.of_rank(3, 0, 4)


@pytest.mark.parametrize("num_classes", [7, 4096, 9000])  # 4096 rows come from one key
def test_initial_rows_are_the_same_matrix_for_any_number_of_ranks(num_classes: int) -> None:
    whole_KD = initial_rows(5, ClassShard(0, num_classes, num_classes), 8)
    assert whole_KD.dtype == torch.float32
    for num_ranks in (2, 3, 5):
        shards = [ClassShard.of_rank(num_classes, rank, num_ranks) for rank in range(num_ranks)]
        assert torch.equal(torch.cat([initial_rows(5, shard, 8) for shard in shards]), whole_KD)
    # A row is a function of the class, not of how many there are.
    assert torch.equal(initial_rows(5, ClassShard(3, 6, num_classes), 8), whole_KD[3:6])


@pytest.mark.parametrize("num_classes", [3, 10, 37])
@pytest.mark.parametrize("dim", [2, 3])
def test_centroids_of_few_dimensions_begin_spread_the_same_on_any_number_of_ranks(
    num_classes: int, dim: int
) -> None:
    rows_KD = initial_centroids(5, ClassShard(0, num_classes, num_classes), dim)
    for ranks in (2, 3):
        parts = [ClassShard.of_rank(num_classes, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([initial_centroids(5, part, dim) for part in parts]), rows_KD)
    torch.testing.assert_close(rows_KD.norm(dim=1), torch.ones(num_classes), rtol=1e-6, atol=0)
    cosines_KK = (rows_KD @ rows_KD.T).fill_diagonal_(-1)
    if dim == 2:
        expected = math.cos(2 * math.pi / num_classes)
        torch.testing.assert_close(cosines_KK.max(1).values, torch.full((num_classes,), expected))
    else:  # of the angle between neighbours if the sphere were tiled by hexagons, which no set can reach
        nearest = math.acos(float(cosines_KK.max().clamp(-1, 1)))
        assert nearest > 0.7 * math.sqrt(8 * math.pi / (math.sqrt(3) * num_classes))
    assert not torch.equal(initial_centroids(6, ClassShard(0, num_classes, num_classes), dim), rows_KD)


def test_centroids_of_many_dimensions_begin_at_random() -> None:
    shard = ClassShard(3, 9, 11)
    assert torch.equal(initial_centroids(5, shard, 4), initial_rows(5, shard, 4))


def test_initial_rows_across_the_border_of_two_keys_are_those_of_either_side() -> None:
    across = initial_rows(1, ClassShard(4090, 4100, 9000), 8)
    assert torch.equal(across[:6], initial_rows(1, ClassShard(0, 4096, 9000), 8)[4090:])
    assert torch.equal(across[6:], initial_rows(1, ClassShard(4096, 9000, 9000), 8)[:4])


def test_initial_rows_differ_by_seed_and_from_one_another() -> None:
    rows_KD = initial_rows(0, ClassShard(0, 3 * 4096, 3 * 4096), 8)
    assert torch.unique(rows_KD, dim=0).shape[0] == len(rows_KD)
    other_KD = initial_rows(1, ClassShard(0, 3 * 4096, 3 * 4096), 8)
    # Neither shifted by a block nor alike anywhere.
    assert not torch.isin(rows_KD[:, 0], other_KD[:, 0]).float().mean() > 0.01


def test_initial_rows_have_independent_normal_entries_and_length_about_one() -> None:
    rows_KD = initial_rows(0, ClassShard(0, 10_000, 10_000), 64).double()
    # 640,000 draws: the mean is known to 1.6e-4, the variance to 2e-3 (one sigma each, times 1/64).
    assert abs(float(rows_KD.mean())) < 1e-3
    assert float(rows_KD.square().sum(1).mean()) == pytest.approx(1.0, abs=0.01)
    covariance_DD = rows_KD.T @ rows_KD / len(rows_KD)
    assert (64 * covariance_DD - torch.eye(64)).abs().max() < 0.06  # six sigma of 1/sqrt(10,000)
