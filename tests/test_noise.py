"""Images of somebody else are found by sub-centroids: the rule longhand, cosines on several ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor

from trainer.distributed import World
from trainer.fused import FusedCocoHead
from trainer.head import ClassShard, initial_rows
from trainer.margins import CosineSoftmax
from trainer.noise import cosines_to_own, judge_noise

NUM_CLASSES, MANY, DIM, BATCH = 7, 3, 5, 40


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    features_BD = F.normalize(torch.randn(BATCH, DIM, generator=generator))
    return features_BD, torch.randint(NUM_CLASSES, (BATCH,), generator=generator)


def own_cosines_on_a_rank(world: World) -> Tensor:
    shard = ClassShard.of_rank(NUM_CLASSES, world.rank, world.size)
    head = FusedCocoHead(shard, DIM, loss=CosineSoftmax(9.0), seed=4, group=world.group, sub_centroids=MANY)
    return cosines_to_own(*batch(), head)


def expected_cosines() -> list[list[float]]:
    rows_RD = initial_rows(4, ClassShard.of_rank(NUM_CLASSES, 0, 1).times(MANY), DIM).double()
    features_BD, labels_B = batch()
    return [
        [float(f_D.double() @ rows_RD[y * MANY + s] / rows_RD[y * MANY + s].norm()) for s in range(MANY)]
        for f_D, y in zip(features_BD, labels_B.tolist(), strict=True)
    ]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_cosines_are_those_to_the_rows_of_the_own_class(num_ranks: int) -> None:
    for cosine_BS in run_on_ranks(own_cosines_on_a_rank, num_ranks):
        torch.testing.assert_close(cosine_BS.double(), torch.tensor(expected_cosines(), dtype=torch.float64))


def test_suspects_are_far_from_the_centroid_that_most_images_of_the_class_are_near() -> None:
    cosines, labels = expected_cosines(), batch()[1].tolist()
    wanted, beside = {}, 0
    for label in set(labels):
        images = [i for i, y in enumerate(labels) if y == label]
        nearest = [max(range(MANY), key=lambda s, i=i: cosines[i][s]) for i in images]
        dominant = max(range(MANY), key=lambda s: (nearest.count(s), -s))
        for i, near in zip(images, nearest, strict=True):
            beside += near != dominant
            angle = math.degrees(math.acos(cosines[i][dominant]))
            if angle > 75.0:
                wanted[i] = angle
    found = judge_noise(torch.tensor(cosines), torch.tensor(labels), 75.0)
    assert dict(found.suspects) == pytest.approx(wanted, rel=1e-4)
    angles = [angle for _, angle in found.suspects]
    assert angles == sorted(angles, reverse=True)
    assert (found.images, found.beside_dominant) == (BATCH, beside)
    assert 0 < len(wanted) < BATCH
