"""Diagnostics against brute force on the whole matrix of cosines, on 1, 2 and 3 ranks, with sub-centroids."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor

from trainer import diagnostics
from trainer.diagnostics import centroid_neighbours, class_results, effective_rank
from trainer.distributed import World
from trainer.head import ClassShard, CocoHead, initial_rows
from trainer.margins import CosineSoftmax

CLASSES, DIM = 13, 6
NAMES = tuple("abcdefghijklm")


def build(world: World, sub_centroids: int) -> CocoHead:
    shard = ClassShard.of_rank(CLASSES, world.rank, world.size)
    return CocoHead(
        shard, DIM, loss=CosineSoftmax(7.0), seed=0, group=world.group, sub_centroids=sub_centroids
    )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(41, DIM, generator=generator), torch.randint(0, 5, (41,), generator=generator) * 2


def diagnose(world: World, sub_centroids: int) -> tuple[Any, Any]:
    diagnostics._PROBES_AT_ONCE, diagnostics._TILE_ROWS = 5, 3  # so that there are several of each
    head = build(world, sub_centroids)
    return centroid_neighbours(head, num_pairs=4), class_results(head, *images(), NAMES)


@pytest.mark.parametrize(("num_ranks", "sub_centroids"), [(1, 1), (2, 2), (3, 1)])
def test_neighbours_and_classes_equal_brute_force(num_ranks, sub_centroids):
    results = run_on_ranks(diagnose, num_ranks, sub_centroids)
    rows = CLASSES * sub_centroids
    unit = F.normalize(initial_rows(0, ClassShard(0, rows, rows), DIM).double())
    class_of = torch.arange(rows) // sub_centroids
    cosine = unit @ unit.T
    other = class_of[:, None] != class_of

    expected = torch.histc(cosine[other].float(), diagnostics.BINS, -1, 1).double()
    best, place = cosine.masked_fill(~other, -2).max(1)
    by_pair: dict[tuple[int, int], float] = {}
    found = zip(best.tolist(), class_of.tolist(), class_of[place].tolist(), strict=True)
    for value, a, b in sorted(found, reverse=True):
        by_pair.setdefault((min(a, b), max(a, b)), value)
    closest = [(pytest.approx(value, abs=1e-6), *pair) for pair, value in by_pair.items()][:4]

    x, labels = images()
    z = (F.normalize(x.double()) @ unit.T).unflatten(1, (CLASSES, -1)).amax(2)
    for neighbours, classes in results:
        assert (neighbours.histogram - expected).abs().sum() <= 4  # float32, at borders of bins
        assert neighbours.histogram.sum() == other.sum()
        assert neighbours.pairs == closest
        assert neighbours.metrics["head/cosine_nearest_mean"] == pytest.approx(float(best.mean()), abs=1e-6)
        for result in classes:
            label = NAMES.index(result.name)
            of_class = z[labels == label]
            own, rest = of_class[:, label], of_class.clone()
            rest[:, label] = -2
            assert result.images == len(of_class)
            assert result.accuracy == pytest.approx(float((own > rest.amax(1)).double().mean()))
            assert result.cosine == pytest.approx(float(own.mean()), abs=1e-6)
            assert result.margin == pytest.approx(float((own - rest.amax(1)).mean()), abs=1e-6)
            loss = F.cross_entropy(7.0 * of_class, torch.full((len(of_class),), label))
            assert result.loss == pytest.approx(float(loss), rel=1e-5)
            counts = torch.bincount(rest.argmax(1), minlength=CLASSES)
            assert counts[NAMES.index(result.taken_for)] == counts.max()
        assert len(classes) == len(labels.unique())
        assert len(classes) <= diagnostics.WORST
        assert [c.accuracy for c in classes] == sorted(c.accuracy for c in classes)


def test_only_some_classes_look_for_their_neighbours_when_there_are_many():
    from trainer.distributed import joined_world

    with joined_world(60) as world:
        neighbours = centroid_neighbours(build(world, 1), max_probes=3)
    assert neighbours.histogram.sum() == 3 * (CLASSES - 1)  # every probe with all others
    assert {a for _, *pair in neighbours.pairs for a in pair} & {0, 6, 12}


def test_the_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-5)
    # 9 images on one axis, 1 on another: singular values 3 and 1
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    lines = torch.eye(3)[[0] * 9 + [1]] * torch.arange(1.0, 11.0)[:, None]
    assert effective_rank(lines) == pytest.approx(math.exp(-(share * share.log()).sum()))
