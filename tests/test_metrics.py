"""Evaluation figures against scikit-learn and brute force over all pairs, on one rank and on several.

Dimensions: N images, D feature, K classes, P pairs.
"""

import numpy as np
import pytest
import torch
from features import FakeWorld, cosines_by_brute_force, make_features, make_tied_features
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from trainer.errors import UserError
from trainer.metrics import identification, intra_inter_cosine, nearest_centroid, verification


def all_pairs(features_ND: Tensor, labels_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of each pair, and whether it is genuine."""
    i, j = np.triu_indices(len(labels_N), 1)
    labels = labels_N.numpy()
    return cosines_by_brute_force(features_ND)[i, j], labels[i] == labels[j]


def equal_error_rate_by_bisection(far: np.ndarray, tar: np.ndarray) -> float:
    """Walk along the polyline by arc fraction u in [0, V - 1] to where FAR + TAR = 1."""
    low, high = 0.0, float(len(far) - 1)
    vertices = np.arange(len(far))
    for _ in range(200):
        u = (low + high) / 2
        if np.interp(u, vertices, far) + np.interp(u, vertices, tar) < 1:
            low = u
        else:
            high = u
    return float(np.interp(high, vertices, far))


SETS = {
    "easy": make_features(150, 12, 16, 0.3),
    "hard": make_features(203, 9, 8, 2.0),
    "ties": make_tied_features(90, 5),
    "few genuine": (make_features(60, 60, 8, 1.0)[0], torch.tensor([7, *range(100, 158), 7])),
    "two classes": make_features(61, 2, 3, 1.5),
    "one genuine, two impostors": (make_features(3, 3, 4, 1.0)[0], torch.tensor([5, -1, 5])),
    "collapsed": (torch.tensor([[0.6, 0.8]]).repeat(20, 1), torch.arange(20) % 4),
}
every_set = pytest.mark.parametrize("name", SETS)


@every_set
@pytest.mark.parametrize("block", [7, 64, 2048])
def test_verification_equals_scikit_learn_over_all_pairs(name: str, block: int) -> None:
    features_ND, labels_N = SETS[name]
    scores_P, genuine_P = all_pairs(features_ND, labels_N)
    far, tar, _ = roc_curve(genuine_P, scores_P, drop_intermediate=False)
    fars = (0.5, 0.1, 0.037, 0.01, 0.001)

    result = verification(features_ND, labels_N, fars=fars, block=block)

    assert (result.num_genuine, result.num_impostor) == (genuine_P.sum(), (~genuine_P).sum())
    assert result.auc == pytest.approx(roc_auc_score(genuine_P, scores_P), abs=1e-12)  # float64 summation
    assert result.best_accuracy == pytest.approx(max((tar + 1 - far) / 2), abs=1e-15)
    assert result.eer == pytest.approx(equal_error_rate_by_bisection(far, tar), abs=1e-12)
    supported = [x for x in fars if x * (~genuine_P).sum() >= 10]
    assert result.tar_at_far == {x: tar[far <= x].max() for x in supported}


@every_set
def test_vertices_of_the_curve_are_the_rates_at_their_thresholds(name: str) -> None:
    features_ND, labels_N = SETS[name]
    scores_P, genuine_P = all_pairs(features_ND, labels_N)
    result = verification(features_ND, labels_N)
    assert (result.far[0], result.tar[0], result.far[-1], result.tar[-1]) == (0, 0, 1, 1)
    assert len(result.far) == len(result.tar) == len(result.thresholds)
    for far, tar, threshold in zip(result.far[::5], result.tar[::5], result.thresholds[::5], strict=True):
        assert far == (scores_P[~genuine_P] >= threshold).mean()
        assert tar == (scores_P[genuine_P] >= threshold).mean()


def test_auc_is_the_mann_whitney_statistic_with_ties_counted_half() -> None:
    scores_P, genuine_P = all_pairs(*SETS["ties"])
    difference = scores_P[genuine_P][:, None] - scores_P[~genuine_P]
    assert (difference == 0).mean() > 0.2  # the set has what it is meant to have
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert verification(*SETS["ties"]).auc == pytest.approx(expected, abs=1e-14)


def test_long_curves_are_thinned_for_drawing_but_stay_close_to_the_full_one() -> None:
    features_ND, labels_N = make_features(400, 8, 6, 1.5)
    scores_P, genuine_P = all_pairs(features_ND, labels_N)
    far, tar, _ = roc_curve(genuine_P, scores_P, drop_intermediate=False)
    result = verification(features_ND, labels_N)
    assert 1000 < len(result.far) <= 2000 < len(far)
    assert np.trapezoid(result.tar, result.far) == pytest.approx(result.auc, abs=1e-4)
    assert np.all(np.diff(result.far) >= 0)
    assert np.all(np.diff(result.tar) >= 0)
    for x in (1e-3, 1e-2, 1e-1):
        assert np.interp(x, result.far, result.tar) == pytest.approx(np.interp(x, far, tar), abs=2e-3)


def test_false_accept_rates_that_the_impostors_cannot_support_are_left_out() -> None:
    features_ND = make_features(21, 2, 8, 1.0)[0]
    labels_N = torch.tensor([0, 0, *range(1, 20)])  # 209 impostor pairs
    assert list(verification(features_ND, labels_N, fars=(0.1, 0.05, 0.04, 1e-3)).tar_at_far) == [0.1, 0.05]


@every_set
@pytest.mark.parametrize("world", [2, 3])
def test_verification_is_the_same_on_every_rank_of_every_world(name: str, world: int) -> None:
    features_ND, labels_N = SETS[name]
    alone = verification(features_ND, labels_N)
    results = FakeWorld(world).run(
        verification, features_ND, labels_N, block=32, collectives=("total", "gather")
    )
    for result in results:
        assert result == alone  # exactly
        for curve in ("far", "tar", "thresholds"):
            np.testing.assert_array_equal(getattr(result, curve), getattr(alone, curve))


def test_order_of_images_does_not_matter() -> None:
    features_ND, labels_N = SETS["hard"]
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(1))
    assert verification(features_ND[order_N], labels_N[order_N]) == verification(features_ND, labels_N)
    assert identification(features_ND[order_N], labels_N[order_N]) == identification(features_ND, labels_N)


def test_a_collapsed_model_recognises_nobody() -> None:
    features_ND, labels_N = SETS["collapsed"]
    result = verification(features_ND, labels_N)
    assert (result.auc, result.best_accuracy, result.eer, result.tar_at_far[0.1]) == (0.5, 0.5, 0.5, 0)
    assert identification(features_ND, labels_N) == {"num_probes": 20, "rank1": 0, "rank5": 0}
    assert nearest_centroid(features_ND, labels_N, torch.ones(4, 2)) == 0


def test_a_perfect_model_is_perfect() -> None:
    labels_N = torch.arange(30) % 6
    features_ND = torch.eye(6)[labels_N]
    result = verification(features_ND, labels_N)
    assert (result.auc, result.best_accuracy, result.eer, result.tar_at_far[0.1]) == (1, 1, 0, 1)
    assert identification(features_ND, labels_N) == {"num_probes": 30, "rank1": 1, "rank5": 1}
    assert nearest_centroid(features_ND, labels_N, torch.eye(6) * 3) == 1
    assert intra_inter_cosine(features_ND, labels_N) == (1, 0)


@every_set
@pytest.mark.parametrize("block", [7, 2048])
def test_identification_equals_sorting_the_gallery_for_every_probe(name: str, block: int) -> None:
    features_ND, labels_N = SETS[name]
    cosines, labels = cosines_by_brute_force(features_ND), labels_N.numpy()
    hits: dict[int, list[bool]] = {1: [], 2: [], 5: []}
    for probe in range(len(labels)):
        gallery = [i for i in range(len(labels)) if i != probe]
        if labels[probe] in labels[gallery]:
            # Nearest first; among equals, other classes first.
            gallery.sort(key=lambda i: (-cosines[probe, i], labels[i] == labels[probe]))
            for rank, found in hits.items():
                found.append(labels[probe] in labels[gallery[:rank]])
    expected = {f"rank{rank}": np.mean(found) for rank, found in hits.items()}
    result = identification(features_ND, labels_N, ranks=(1, 2, 5), block=block)
    assert result == {"num_probes": len(hits[1]), **expected}


def test_identification_counts_a_tie_as_wrong() -> None:
    features_ND = torch.tensor(
        [[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]
    )  # image 0: a mate and a stranger, equally near
    result = identification(features_ND, torch.tensor([0, 0, 1]), ranks=(1, 2))
    assert result == {"num_probes": 2, "rank1": 0, "rank2": 1}


@pytest.mark.parametrize("world", [2, 3])
def test_identification_and_accuracy_are_the_same_on_every_rank_of_every_world(world: int) -> None:
    features_ND, labels_N = SETS["hard"]
    centroids_KD = make_features(9, 9, 8, 0.0)[0]
    for metric, args in ((identification, ()), (nearest_centroid, (centroids_KD,))):
        alone = metric(features_ND, labels_N, *args)
        results = FakeWorld(world).run(metric, features_ND, labels_N, *args, block=20)
        assert results == [alone] * world


@pytest.mark.parametrize("block", [7, 2048])
def test_nearest_centroid_is_the_argmax_of_the_cosine(block: int) -> None:
    features_ND, labels_N = make_features(301, 23, 8, 1.0)
    centroids_KD = (
        torch.randn(23, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 24)[:, None]
    )
    features, centroids = features_ND.double().numpy(), centroids_KD.double().numpy()
    cosines = features @ centroids.T / np.linalg.norm(centroids, axis=1)
    expected = (cosines.argmax(1) == labels_N.numpy()).mean()
    assert 0.3 < expected < 0.9
    assert nearest_centroid(features_ND, labels_N, centroids_KD, block=block) == expected


@every_set
def test_intra_and_inter_cosines_are_means_over_pairs(name: str) -> None:
    features_ND, labels_N = SETS[name]
    i, j = np.triu_indices(len(labels_N), 1)
    features = features_ND.double().numpy()
    cosines = (features @ features.T)[i, j]
    genuine_P = labels_N.numpy()[i] == labels_N.numpy()[j]
    expected = (cosines[genuine_P].mean(), cosines[~genuine_P].mean())
    assert intra_inter_cosine(features_ND, labels_N) == pytest.approx(expected, abs=1e-13)


def test_a_feature_without_direction_is_similar_to_nobody() -> None:
    features_ND = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert identification(features_ND, torch.tensor([0, 0, 1, 1]), ranks=(1,))["rank1"] == 0
    assert intra_inter_cosine(features_ND, torch.tensor([0, 0, 1, 1])) == (0, 0.25)


def test_what_the_caller_can_get_wrong_is_named() -> None:
    features_ND, labels_N = make_features(6, 3, 4, 1.0)
    with pytest.raises(UserError, match="no two of the 6 evaluated images are of the same class"):
        verification(features_ND, torch.arange(6))
    with pytest.raises(UserError, match="no two of the 6 evaluated images are of a different class"):
        verification(features_ND, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(UserError, match="of the same class"):
        identification(features_ND, torch.arange(6))
    with pytest.raises(UserError, match="no images"):
        verification(features_ND[:0], labels_N[:0])
    with pytest.raises(UserError, match="label 3 has no centroid: there are 3 classes"):
        nearest_centroid(features_ND, torch.tensor([0, 1, 2, 3, 0, 1]), torch.eye(3, 4))
    with pytest.raises(ValueError, match="not N x D and N"):
        verification(features_ND, labels_N[:-1])
    with pytest.raises(ValueError, match=r"part \(2, 2\)"):
        identification(features_ND, torch.tensor([0, 0, 1, 1, 2, 2]), part=(2, 2))
    features_ND[4] *= 2
    with pytest.raises(UserError, match="feature of image 4 has length 2 instead of 1: were they normalised"):
        intra_inter_cosine(features_ND, labels_N)
    features_ND[1, 2] = torch.nan
    with pytest.raises(
        UserError, match="feature of image 1 has length nan instead of 1: the model has diverged"
    ):
        verification(features_ND, labels_N)


def test_a_world_without_gather_is_refused() -> None:
    features_ND, labels_N = make_features(40, 3, 4, 1.0)
    with pytest.raises(ValueError, match="gather returned"):
        verification(features_ND, labels_N, part=(0, 2), block=8)
