"""Lookup protocols against sorting the whole gallery in plain Python, and against faiss and scikit-learn.

Dimensions: P probes, G gallery, D feature, k nearest.
"""

import faiss
import numpy as np
import pytest
import torch
from features import FakeWorld, cosines_by_brute_force, make_features, make_tied_features
from sklearn.metrics import average_precision_score

from trainer.errors import UserError
from trainer.protocols.distractors import (
    BestDistractors,
    accept_rates,
    genuine_pairs,
    open_set_rates,
    rank_among,
)
from trainer.protocols.identification import identification, pooled
from trainer.protocols.ranking import (
    NOTHING,
    cosines_of,
    hits_of,
    images_of,
    keys_of,
    nearest,
    tpir_at_fpir,
)
from trainer.protocols.reid import Seen, reid
from trainer.protocols.reranking import reranked
from trainer.protocols.retrieval import retrieval

SETS = {"hard": make_features(97, 9, 8, 1.5), "ties": make_tied_features(60, 5)}
every_set = pytest.mark.parametrize("name", SETS)


def test_keys_sort_as_cosines_do_with_misses_first_and_can_be_read_back() -> None:
    values = torch.tensor([[0.5, -0.0, 0.0, -1.0, 1.0, -1e-30, 1e-30, 0.5, 0.25]])
    hit = torch.tensor([[True, True, False, False, True, True, False, False, True]])
    excluded = torch.zeros_like(hit)
    excluded[0, 8] = True
    keys = keys_of(values, hit, excluded)
    expected = sorted(range(8), key=lambda i: (-values[0, i].item(), bool(hit[0, i])))
    assert keys[0].argsort(descending=True).tolist() == [*expected, 8]
    assert torch.equal(cosines_of(keys)[0, :8], values[0, :8])
    assert hits_of(keys).tolist()[0][:8] == hit.tolist()[0][:8]
    assert (keys[0, 8], bool(hits_of(keys)[0, 8]), cosines_of(keys)[0, 8]) == (NOTHING, False, -torch.inf)


def ranked_lists(features_ND: torch.Tensor, labels_N: torch.Tensor) -> list[list[bool]]:
    """For every image: which of all others, nearest first, are of its class; among equals, others first."""
    cosines, labels = cosines_by_brute_force(features_ND), labels_N.tolist()
    lists = []
    for probe in range(len(labels)):
        others = [i for i in range(len(labels)) if i != probe]
        others.sort(key=lambda i: (-cosines[probe, i], labels[i] == labels[probe]))
        lists.append([labels[i] == labels[probe] for i in others])
    return lists


@every_set
@pytest.mark.parametrize("block", [7, 2048])
def test_retrieval_equals_sorting_for_every_query(name: str, block: int) -> None:
    features_ND, labels_N = SETS[name]
    lists = [ranked for ranked in ranked_lists(features_ND, labels_N) if any(ranked)]
    expected: dict[str, list[float]] = {"recall@1": [], "recall@3": [], "r_precision": [], "map@r": []}
    for ranked in lists:
        num_relevant = sum(ranked)
        expected["recall@1"].append(ranked[0])
        expected["recall@3"].append(any(ranked[:3]))
        expected["r_precision"].append(sum(ranked[:num_relevant]) / num_relevant)
        precisions = [sum(ranked[: i + 1]) / (i + 1) for i in range(num_relevant) if ranked[i]]
        expected["map@r"].append(sum(precisions) / num_relevant)
    images = images_of(features_ND, labels_N)
    values, counts_P = retrieval(images, images, ks=(1, 3), block=block)
    assert int(counts_P.sum()) == len(lists)
    for key, wanted in expected.items():
        np.testing.assert_allclose(values[key].numpy(), wanted, atol=1e-15, err_msg=key)


@pytest.mark.parametrize("world", [2, 3])
def test_lookup_is_the_same_on_every_rank_of_every_world(world: int) -> None:
    images = images_of(*SETS["hard"])
    alone, _ = retrieval(images, images)
    for values, _ in FakeWorld(world).share(
        lambda sharing: retrieval(images, images, (1, 2, 4, 8), sharing, 8)
    ):
        assert values.keys() == alone.keys()
        assert all(torch.equal(values[key], alone[key]) for key in alone)


def test_neighbours_are_those_of_faiss() -> None:
    features_ND, labels_N = make_features(300, 20, 16, 1.0)
    search = faiss.IndexFlatIP(16)
    search.add(features_ND[100:].numpy())
    cosines, ids = search.search(features_ND[:100].numpy(), 5)
    gallery = images_of(features_ND[100:], labels_N[100:], first_id=100)
    keys = nearest(images_of(features_ND[:100], labels_N[:100]), gallery, 5, block=64)
    np.testing.assert_allclose(cosines_of(keys).numpy(), cosines, atol=1e-6)  # faiss sums in float32
    assert torch.equal(hits_of(keys), labels_N[100:][torch.from_numpy(ids)] == labels_N[:100, None])


def test_identification_of_probes_in_a_gallery_with_strangers() -> None:
    features_ND, labels_N = make_features(260, 12, 8, 1.2)
    in_gallery = (torch.arange(260) % 3 == 0) & (labels_N < 8)  # classes 8.. are strangers
    probes = images_of(features_ND[~in_gallery], labels_N[~in_gallery])
    gallery = images_of(features_ND[in_gallery], labels_N[in_gallery], first_id=1000)
    values, mated_P, rates = identification(probes, gallery, ks=(1, 3), fpirs=(0.4, 0.2, 0.001), block=16)

    cosines = (probes.features.double() @ gallery.features.double().T).float().numpy()
    order = np.argsort(-cosines, axis=1)
    right = gallery.labels.numpy()[order] == probes.labels.numpy()[:, None]
    known = np.isin(probes.labels.numpy(), gallery.labels.numpy())
    np.testing.assert_array_equal(mated_P.numpy(), known)
    np.testing.assert_array_equal(values["rank1"].numpy(), right[known, 0])
    np.testing.assert_array_equal(values["rank3"].numpy(), right[known, :3].any(axis=1))
    best = cosines.max(axis=1)
    assert list(rates) == [x for x in (0.4, 0.2, 0.001) if x * (~known).sum() >= 10] == [0.4, 0.2]
    for fpir, hits in rates.items():
        allowed = [t for t in np.append(best, np.inf) if (best[~known] >= t).mean() <= fpir]
        assert float(hits.mean()) == max((right[known, 0] & (best[known] >= t)).mean() for t in allowed)


def test_open_set_rates_are_zero_for_a_collapsed_model() -> None:
    same = torch.full((50,), 0.7)
    rates = tpir_at_fpir(same, torch.ones(50, dtype=torch.bool), same, (0.2, 0.1))
    assert {fpir: float(hits.sum()) for fpir, hits in rates.items()} == {0.2: 0.0}


def test_a_template_is_the_mean_of_its_media() -> None:
    features_ND = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    template = torch.tensor([7, 7, 7, 3, 3, 7])
    media = torch.tensor([1, 1, 2, 1, 2, 2])
    found, names = pooled(features_ND, template, media)
    f = features_ND.double()
    expected = torch.stack([(f[3] + f[4]) / 2, ((f[0] + f[1]) / 2 + (f[2] + f[5]) / 2) / 2])
    assert names.tolist() == [3, 7]
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected).float())
    mean, _ = pooled(features_ND, template)
    torch.testing.assert_close(
        mean[1], torch.nn.functional.normalize(f[template == 7].mean(0), dim=0).float()
    )


def best_of(world: int, sizes: tuple[int, ...], probes, features_ND, places_N, deepest: int = 100):
    def on_rank(sharing):
        best = BestDistractors(probes, sizes, deepest)
        rank, size = sharing.part
        for block in range(rank, 10, size):  # uneven blocks, dealt to the ranks
            rows = slice(block * 31, (block + 1) * 31)
            best.add(features_ND[rows], places_N[rows])
        return list(best.finish(sharing))

    return FakeWorld(world).share(on_rank)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_among_distractors_equal_brute_force(world: int, tied: bool) -> None:
    make = make_tied_features if tied else lambda n, k, seed=0: make_features(n, k, 4, 1.0, seed)
    probes_PD, labels_P = make(24, 5)
    distractors_ND, _ = make(310, 1, seed=1)
    places_N = torch.randperm(310, generator=torch.Generator().manual_seed(2))
    probes, sizes = images_of(probes_PD, labels_P), (3, 50, 300)
    first_Q, second_Q, scores_Q = genuine_pairs(probes)
    expected_pairs = {(i, j) for i in range(24) for j in range(24) if i != j and labels_P[i] == labels_P[j]}
    assert set(zip(first_Q.tolist(), second_Q.tolist(), strict=True)) == expected_pairs
    cosines = (probes_PD.double() @ distractors_ND.double().T).float()
    for results in best_of(world, sizes, probes, distractors_ND, places_N):
        for (size, seen, best_Pk), wanted in zip(results, sizes, strict=True):
            assert (size, seen) == (wanted, wanted)
            chosen = cosines[:, places_N < size]
            expected = [1 + int((chosen[i] >= s).sum()) for i, s in zip(first_Q, scores_Q, strict=True)]
            found = rank_among(first_Q, scores_Q, best_Pk)
            assert found.tolist() == [min(rank, best_Pk.shape[1] + 1) for rank in expected]

            nonmated = chosen.amax(dim=1)
            [hits] = open_set_rates(first_Q, scores_Q, best_Pk, (0.5,)).values()
            limits = [t for t in [*nonmated.tolist(), 2.0] if (nonmated >= t).double().mean() <= 0.5]
            # any threshold above a limit that is not allowed is allowed too
            floor = nonmated.sort(descending=True).values[12].item() if len(nonmated) > 12 else -2
            accepted = (scores_Q > floor) & (torch.tensor(expected) == 1)
            assert limits
            assert torch.equal(hits, accepted.double())


def test_accept_rates_among_distractors_are_exact_or_left_out() -> None:
    probes_PD, labels_P = make_features(24, 5, 4, 1.0)
    distractors_ND, _ = make_features(310, 1, 4, 3.0, seed=1)
    probes = images_of(probes_PD, labels_P)
    first_Q, _, scores_Q = genuine_pairs(probes)
    fars = (0.2, 0.02, 0.005, 1e-4)
    [[(_, _, best_Pk)]] = best_of(1, (300,), probes, distractors_ND, torch.arange(310), deepest=60)
    found = accept_rates(first_Q, scores_Q, best_Pk, 300, fars)
    impostors = (probes_PD.double() @ distractors_ND[:300].double().T).float().flatten()
    for far, hits in found.items():
        allowed = [t for t in torch.cat([impostors, scores_Q]) if (impostors >= t).double().mean() <= far]
        assert float(hits.mean()) == max(float((scores_Q >= t).double().mean()) for t in allowed)
    assert 0.005 in found
    assert 1e-4 not in found  # less than an error
    [[(_, _, shallow_Pk)]] = best_of(1, (300,), probes, distractors_ND, torch.arange(310), deepest=2)
    assert accept_rates(first_Q, scores_Q, shallow_Pk, 300, (0.2,)) == {}  # more errors than were kept


def test_distractors_are_counted_and_sizes_must_rise() -> None:
    probes = images_of(*make_features(10, 2, 4, 1.0))
    best = BestDistractors(probes, (2, 1000))
    best.add(torch.eye(4), torch.arange(4))
    assert [(size, seen) for size, seen, _ in best.finish()] == [(2, 2), (1000, 4)]
    with pytest.raises(UserError, match=r"sizes: \[5, 5\] are not rising"):
        BestDistractors(probes, (5, 5))


def market(num: int, seed: int) -> tuple[torch.Tensor, Seen]:
    """Persons -1 (junk), 0 (background) and others, seen by three cameras; tied features."""
    features_ND, persons_N = make_tied_features(num, 8, seed)
    generator = torch.Generator().manual_seed(seed)
    noise_ND = 0.2 * torch.randn(num, 4, generator=generator)
    features_ND = torch.nn.functional.normalize(features_ND + noise_ND * (torch.arange(num) % 2)[:, None])
    return features_ND, Seen(persons_N - 1, torch.randint(3, (num,), generator=generator))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_reidentification_equals_the_definition_query_by_query(world: int) -> None:
    (queries_QD, queries), (gallery_GD, gallery) = market(40, 1), market(90, 2)
    queries = Seen(queries.persons.clamp(min=1), queries.cameras)
    cosines = (queries_QD.double() @ gallery_GD.double().T).float()
    expected: dict[str, list[float]] = {"rank1": [], "rank5": [], "map": [], "minp": []}
    counted = []
    for q in range(40):
        person, camera = queries.persons[q], queries.cameras[q]
        kept = [
            g
            for g in range(90)
            if gallery.persons[g] != -1
            and not (gallery.persons[g] == person and gallery.cameras[g] == camera)
        ]
        kept.sort(key=lambda g: (-cosines[q, g].item(), bool(gallery.persons[g] == person)))
        ranked = [bool(gallery.persons[g] == person) for g in kept]
        counted.append(any(ranked))
        if any(ranked):
            places = [i + 1 for i, hit in enumerate(ranked) if hit]
            expected["rank1"].append(ranked[0])
            expected["rank5"].append(any(ranked[:5]))
            expected["map"].append(np.mean([(n + 1) / place for n, place in enumerate(places)]))
            expected["minp"].append(len(places) / places[-1])
    results = FakeWorld(world).share(
        lambda sharing: reid(lambda rows: cosines[rows], queries, gallery, (1, 5), sharing, block_cosines=500)
    )
    for values, counts_Q in results:
        assert counts_Q.tolist() == counted
        for key, wanted in expected.items():
            np.testing.assert_allclose(values[key].numpy(), wanted, atol=1e-12, err_msg=key)


def test_mean_average_precision_is_that_of_scikit_learn_without_ties() -> None:
    features_ND, persons_N = make_features(120, 10, 8, 1.0)
    queries = Seen(persons_N[:40], torch.zeros(40, dtype=torch.int64))
    gallery = Seen(persons_N[40:], torch.ones(80, dtype=torch.int64))
    cosines = features_ND[:40] @ features_ND[40:].T
    values, counts_Q = reid(lambda rows: cosines[rows], queries, gallery)
    expected = [
        average_precision_score(gallery.persons == queries.persons[q], cosines[q])
        for q in range(40)
        if counts_Q[q]
    ]
    np.testing.assert_allclose(values["map"].numpy(), expected, atol=1e-12)


def reranked_densely(q_QD: np.ndarray, g_GD: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """The paper's procedure with dense matrices, as its authors publish it."""
    both = np.concatenate([q_QD, g_GD])
    d = np.maximum(2 - 2 * both @ both.T, 0)
    np.fill_diagonal(d, 0)
    d = d / d.max(axis=1, keepdims=True)
    rank = np.argsort(d, axis=1, kind="stable")
    V = np.zeros_like(d)

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    for i in range(len(both)):
        core = reciprocal(i, k1)
        grown = set(core)
        for j in core:
            near = reciprocal(j, int(np.around(k1 / 2)))
            if len(set(near) & set(core)) > 2 / 3 * len(near):
                grown |= set(near)
        members = sorted(grown)
        V[i, members] = np.exp(-d[i, members]) / np.exp(-d[i, members]).sum()
    V = np.stack([V[rank[i, :k2]].mean(axis=0) for i in range(len(both))])
    Q = len(q_QD)
    overlap = np.array([[np.minimum(V[q], V[g]).sum() for g in range(Q, len(both))] for q in range(Q)])
    return (1 - weight) * (1 - overlap / (2 - overlap)) + weight * d[:Q, Q:]


@pytest.mark.parametrize("k2", [1, 3])
def test_reranking_equals_the_dense_procedure(k2: int) -> None:
    features_ND, _ = make_features(90, 8, 6, 0.8)
    queries_QD, gallery_GD = features_ND[:20], features_ND[20:]
    dense = reranked_densely(queries_QD.double().numpy(), gallery_GD.double().numpy(), 7, k2, 0.3)

    def on_rank(sharing):
        return reranked(queries_QD, gallery_GD, k1=7, k2=k2, weight=0.3, sharing=sharing, block=16)(
            slice(5, 20)
        )

    for found in FakeWorld(2).share(on_rank):
        np.testing.assert_allclose(-found.numpy(), dense[5:20], atol=1e-6)  # returned as float32
