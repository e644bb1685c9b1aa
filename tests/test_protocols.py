"""Closed set, few shots, albums, all pairs by histogram and bootstrap against plain loops.

Dimensions: N images, K classes, D feature, P pairs.
"""

import itertools

import numpy as np
import pytest
import torch
from features import FakeWorld, make_features, make_tied_features
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve
from sklearn.neighbors import NearestCentroid

from trainer.errors import UserError
from trainer.metrics import verification
from trainer.protocols.bootstrap import draws, interval, mean_interval
from trainer.protocols.closed_set import class_means, closed_set
from trainer.protocols.drawn_pairs import drawn_intervals
from trainer.protocols.few_shot import few_shot
from trainer.protocols.open_set import BINS_OF_ONE, all_pairs
from trainer.protocols.persons import Album, accuracy, best_weights, weight_grid
from trainer.tiles import ALONE

every_world = pytest.mark.parametrize("world", [1, 2, 3])


@every_world
def test_closed_set_equals_scikit_learn(world: int) -> None:
    generator = torch.Generator().manual_seed(3)
    features_ND, labels_N = make_features(420, 7, 6, 1.0)
    embeddings_ND = features_ND * torch.rand(420, 1, generator=generator).add(0.5)
    train, test = slice(0, 200), slice(200, 420)
    means_KD = class_means(embeddings_ND[train], labels_N[train], 7)
    model = NearestCentroid().fit(embeddings_ND[train].double().numpy(), labels_N[train])
    np.testing.assert_allclose(means_KD.numpy(), model.centroids_, atol=1e-12)
    by_distance = model.predict(embeddings_ND[test].double().numpy())
    units_KD = means_KD / means_KD.norm(dim=1, keepdim=True)
    cosines = features_ND[test].double() @ units_KD.T
    order = cosines.argsort(dim=1, descending=True)
    labels = labels_N[test]
    for found in FakeWorld(world).share(
        lambda sharing: closed_set(embeddings_ND[test], labels, means_KD, (1, 3, 9), sharing, 50)
    ):
        assert list(found.hits) == ["accuracy", "top3", "accuracy_euclidean", "top3_euclidean"]  # 9 > 7 - 1
        np.testing.assert_array_equal(found.hits["accuracy"].numpy(), order[:, 0] == labels)
        np.testing.assert_array_equal(
            found.hits["top3"].numpy(), (order[:, :3] == labels[:, None]).any(dim=1)
        )
        np.testing.assert_array_equal(found.hits["accuracy_euclidean"].numpy(), by_distance == labels.numpy())
        expected = confusion_matrix(labels, order[:, 0], labels=range(7))
        np.testing.assert_array_equal(found.confusion(labels, 7).numpy(), expected)


def test_a_class_is_as_near_as_its_nearest_sub_centroid() -> None:
    features_ND, labels_N = make_features(50, 5, 6, 1.0)
    rows_KSD = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))
    nearest_row = (features_ND @ torch.nn.functional.normalize(rows_KSD.flatten(0, 1)).T).argmax(dim=1)
    found = closed_set(features_ND, labels_N, rows_KSD)
    assert found.predicted_N.tolist() == (nearest_row // 3).tolist()
    assert found.hits["accuracy"].tolist() == (nearest_row // 3 == labels_N).double().tolist()


def test_a_label_without_centroid_is_refused() -> None:
    with pytest.raises(UserError, match="label 4 has no centroid: there are 3 classes"):
        closed_set(torch.eye(3), torch.tensor([0, 4, 1]), torch.eye(3))
    with pytest.raises(UserError, match="class 1 has no image"):
        class_means(torch.eye(3), torch.tensor([0, 0, 2]), 3)


def test_a_collapsed_model_classifies_nothing() -> None:
    found = closed_set(torch.ones(6, 2), torch.arange(6) % 3, torch.ones(3, 2), ks=(1, 2))
    assert all(not values.any() for values in found.hits.values())


@every_world
@pytest.mark.parametrize("shots", [1, 3])
def test_few_shot_is_the_same_on_every_rank_and_as_good_as_it_should_be(world: int, shots: int) -> None:
    features_ND, labels_N = make_features(300, 15, 8, 1.0)
    alone = few_shot(features_ND, labels_N, 5, shots, 2, 40)
    for found in FakeWorld(world).share(
        lambda sharing: few_shot(features_ND, labels_N, 5, shots, 2, 40, None, 0, sharing)
    ):
        assert torch.equal(found, alone)
    assert set(alone.mul(10).round().tolist()) <= set(range(11))  # of ten queries
    assert 0.4 < alone.mean() < 1
    assert not torch.equal(alone, few_shot(features_ND, labels_N, 5, shots, 2, 40, seed=1))
    perfect = few_shot(torch.eye(15)[labels_N], labels_N, 15, shots, 2, 7)
    assert torch.equal(perfect, torch.ones(7, dtype=torch.float64))
    collapsed = few_shot(torch.ones(300, 8) / 8**0.5, labels_N, 5, shots, 2, 7)
    assert not collapsed.any()


def test_one_shot_accuracy_is_the_mean_over_all_pairs_of_images_in_expectation() -> None:
    """2-way 1-shot: P(cos(query, own example) > cos(query, other's)), by enumeration of all triples."""
    features_ND, labels_N = make_features(24, 3, 4, 1.5)
    cosines = features_ND.double() @ features_ND.double().T
    chances = {}
    for a, b in itertools.permutations(range(3), 2):
        own, other = (labels_N == a).nonzero()[:, 0], (labels_N == b).nonzero()[:, 0]
        chances[a, b] = np.mean(
            [
                (cosines[q, e] > cosines[q, other]).double().mean().item()
                for q, e in itertools.permutations(own.tolist(), 2)
            ]
        )
    found = few_shot(features_ND, labels_N, 2, 1, 1, 4000)
    assert float(found.mean()) == pytest.approx(np.mean(list(chances.values())), abs=0.02)  # 4 sigma


def test_episodes_within_groups_take_classes_of_one_group() -> None:
    labels_N = torch.arange(6).repeat_interleave(4)
    features_ND = torch.eye(3)[labels_N % 3]  # classes 0 and 3, 1 and 4, 2 and 5 cannot be told apart
    groups = ["a", "a", "a", "b", "b", "b"]
    assert few_shot(features_ND, labels_N, 3, 1, 1, 50, groups).mean() == 1
    assert few_shot(features_ND, labels_N, 3, 1, 1, 50).mean() < 1
    with pytest.raises(UserError, match="ways: there are not 4 classes of one group with 2 images each"):
        few_shot(features_ND, labels_N, 4, 1, 1, 50, groups)


def make_album(num: int, seed: int) -> Album:
    """Three regions of different quality; the third is noise."""
    generator = torch.Generator().manual_seed(seed)
    identities = torch.randint(8, (num,), generator=generator)
    centroids = torch.randn(8, 6, generator=generator)
    regions = [
        torch.nn.functional.normalize(gain * centroids[identities] + torch.randn(num, 6, generator=generator))
        for gain in (1.0, 0.7, 0.0)
    ]
    return Album(tuple(regions), identities, torch.arange(num) % 2)


def album_accuracy_by_loops(album: Album, weights: tuple[float, ...]) -> float:
    averages = []
    for half in (0, 1):
        queries = [i for i in range(len(album.halves)) if album.halves[i] == half]
        others = [i for i in range(len(album.halves)) if album.halves[i] != half]
        hits = 0
        for q in queries:
            score = {
                g: sum(
                    w * float(f[q].double() @ f[g].double())
                    for w, f in zip(weights, album.features_R, strict=True)
                )
                for g in others
            }
            hits += bool(album.identities[max(others, key=score.__getitem__)] == album.identities[q])
        averages.append(hits / len(queries))
    return sum(averages) / 2


@every_world
def test_album_accuracy_is_the_mean_of_both_directions(world: int) -> None:
    album, weights = make_album(61, 0), (0.5, 0.3, 0.2)
    expected = album_accuracy_by_loops(album, weights)
    assert 0.3 < expected < 1
    for found, hits_N in FakeWorld(world).share(lambda sharing: accuracy(album, weights, sharing)):
        assert found == pytest.approx(expected)
        assert hits_N.shape == (61,)


def test_weights_are_the_best_of_the_grid_on_the_album_they_are_given() -> None:
    grid = weight_grid(3)
    assert len(grid) == len(set(grid)) == 66
    assert all(sum(weights) == pytest.approx(1) for weights in grid)
    validation, test = make_album(80, 1), make_album(80, 2)
    chosen = best_weights(validation)
    assert accuracy(validation, chosen)[0] == max(accuracy(validation, weights)[0] for weights in grid)
    assert accuracy(test, chosen)[0] > accuracy(test, (0, 0, 1))[0]
    assert best_weights(validation, ALONE) == FakeWorld(2).share(lambda s: best_weights(validation, s))[1]


def test_a_collapsed_model_recognises_no_person() -> None:
    album = make_album(20, 0)
    same = Album((torch.ones(20, 6) / 6**0.5,) * 3, album.identities, album.halves)
    assert accuracy(same, (0.5, 0.3, 0.2))[0] == 0


def test_an_album_without_one_half_is_refused() -> None:
    album = make_album(10, 0)
    with pytest.raises(UserError, match="half 1 of the split is empty"):
        accuracy(Album(album.features_R, album.identities, torch.zeros(10)), (1, 0, 0))


def rounded_down(cosines: np.ndarray) -> np.ndarray:
    return np.floor(cosines * BINS_OF_ONE) / BINS_OF_ONE


HISTOGRAM_SETS = {
    "easy": make_features(150, 12, 16, 0.3),
    "hard": make_features(403, 9, 8, 2.0),
    "ties": make_tied_features(90, 5),
    "collapsed": (torch.tensor([[0.6, 0.8]]).repeat(20, 1), torch.arange(20) % 4),
}


@pytest.mark.parametrize("name", HISTOGRAM_SETS)
@pytest.mark.parametrize("block", [64, 1024])
def test_all_pairs_by_histogram_are_exact_to_one_bin(name: str, block: int) -> None:
    features_ND, labels_N = HISTOGRAM_SETS[name]
    i, j = np.triu_indices(len(labels_N), 1)
    features = features_ND.double().numpy()
    scores_P, same_P = (features @ features.T)[i, j], labels_N.numpy()[i] == labels_N.numpy()[j]
    found = all_pairs(features_ND, labels_N, fars=(0.1, 0.01), block=block)
    assert (found.num_genuine, found.num_impostor) == (same_P.sum(), (~same_P).sum())

    def tar_at(far: float, shift: float) -> float:
        """TAR if every impostor scored ``shift`` higher."""
        impostors = np.sort(scores_P[~same_P] + shift)[::-1]
        allowed = int(far * len(impostors) + 1e-9)
        return np.mean(scores_P[same_P] > impostors[allowed])

    width = 1 / BINS_OF_ONE + 1e-6  # and the rounding of a float32 product
    for far, tar in found.tar_at_far.items():
        assert tar_at(far, width) <= tar <= tar_at(far, -width)
    assert len(found.tar_at_far) == sum(far * (~same_P).sum() >= 10 for far in (0.1, 0.01))
    exact = verification(features_ND, labels_N)
    assert found.auc == pytest.approx(exact.auc, abs=2e-4)
    assert found.eer == pytest.approx(exact.eer, abs=2e-3)


def test_all_pairs_by_histogram_equal_the_figures_of_rounded_scores() -> None:
    """Corners of a cube have cosines on the edges of bins: rounding down changes nothing at all."""
    features_ND, labels_N = HISTOGRAM_SETS["ties"]
    exact, found = (
        verification(features_ND, labels_N),
        all_pairs(features_ND, labels_N, (1e-1, 1e-2, 1e-3, 1e-4)),
    )
    assert (found.auc, found.eer, found.tar_at_far) == (exact.auc, exact.eer, exact.tar_at_far)
    np.testing.assert_array_equal(found.far, exact.far)
    assert set(found.thresholds) >= set(exact.thresholds) & {0.0, 0.5, -0.5}


@pytest.mark.parametrize("world", [2, 3])
def test_all_pairs_by_histogram_are_the_same_on_every_rank_of_every_world(world: int) -> None:
    features_ND, labels_N = HISTOGRAM_SETS["hard"]
    alone = all_pairs(features_ND, labels_N, block=64)
    results = FakeWorld(world).share(
        lambda sharing: all_pairs(features_ND, labels_N, sharing=sharing, block=64)
    )
    assert all(result == alone for result in results)


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    """One image of each of 400 identities: the plain bootstrap, whose interval is mean +- 1.96 sigma."""
    values_N = np.random.default_rng(0).random(400)
    low, high = mean_interval(values_N, np.arange(400), 2000)
    sigma = values_N.std() / 20
    assert low == pytest.approx(values_N.mean() - 1.96 * sigma, abs=0.15 * sigma)
    assert high == pytest.approx(values_N.mean() + 1.96 * sigma, abs=0.15 * sigma)


def test_images_of_one_identity_are_drawn_together() -> None:
    """Ten equal images of each of 40 identities say no more than one of each."""
    values_K = np.random.default_rng(1).random(40)
    once = mean_interval(values_K, np.arange(40), 500)
    tenfold = mean_interval(np.repeat(values_K, 10), np.repeat(np.arange(40), 10), 500)
    assert tenfold == pytest.approx(once, abs=1e-12)
    assert mean_interval(values_K, np.arange(40), 500, seed=1) != once


def test_draws_without_a_value_are_left_out() -> None:
    low, high = interval(lambda counts_K: float(counts_K[0]) if counts_K[0] else float("nan"), 3, 200)
    assert (low >= 1, high <= 3) == (True, True)


def drawn_by_brute_force(features_ND, labels_N, num_groups: int, resamples: int) -> dict[str, np.ndarray]:
    """Weigh every pair by how often its two identities were drawn; a group of identities is drawn as one."""
    i, j = np.triu_indices(len(labels_N), 1)
    scores_P = np.floor((features_ND.double() @ features_ND.double().T).numpy()[i, j] * BINS_OF_ONE)
    identity_N = np.unique(labels_N.numpy(), return_inverse=True)[1]
    same_P = identity_N[i] == identity_N[j]
    group_N = identity_N % num_groups
    rows = []
    for counts_G in draws(group_N.max() + 1, resamples):
        count_N = counts_G[group_N]
        weight_P = np.where(same_P, count_N[i], count_N[i] * count_N[j])
        far_V, tar_V, _ = roc_curve(same_P, scores_P, sample_weight=weight_P, drop_intermediate=False)
        dense = np.linspace(0, 1, 200_001)
        eer = dense[np.abs(np.interp(dense, far_V, tar_V) + dense - 1).argmin()]
        auc = roc_auc_score(same_P, scores_P, sample_weight=weight_P)
        rows.append((auc, ((tar_V + 1 - far_V) / 2).max(), eer))
    names = ("auc", "best_accuracy", "eer")
    return {n: np.quantile(v, [0.025, 0.975]) for n, v in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize(("world", "groups"), [(1, 100), (3, 100), (2, 4)])
def test_intervals_over_all_pairs_equal_brute_force(world: int, groups: int) -> None:
    features_ND, labels_N = make_features(60, 9, 256, 4.0)
    features_ND = features_ND.sign() / 16  # of unit length; cosines are multiples of 1/128, exactly
    features_ND[0] = 0  # has no direction
    curve = all_pairs(features_ND, labels_N)
    expected = drawn_by_brute_force(features_ND, 3 * labels_N, groups, 25)
    for found in FakeWorld(world).share(
        lambda sharing: drawn_intervals(features_ND, 3 * labels_N, curve, 25, sharing, groups)
    ):
        assert list(found) == list(expected)
        for name, bounds in expected.items():
            assert found[name] == pytest.approx(tuple(bounds), abs=1e-5 if name == "eer" else 1e-9), name


def test_intervals_of_many_scores_need_no_more_bins() -> None:
    """More distinct genuine scores than bins: the curve is drawn through some of them."""
    features_ND, labels_N = make_features(300, 12, 8, 1.0)
    expected = drawn_by_brute_force(features_ND, labels_N, 100, 10)
    found = drawn_intervals(features_ND, labels_N, verification(features_ND, labels_N), 10)
    for name, bounds in expected.items():
        assert found[name] == pytest.approx(tuple(bounds), abs=1e-3), name
