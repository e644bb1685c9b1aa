from collections import Counter

import numpy as np
import pytest
from hostile import fuzz
from hypothesis import given
from hypothesis import strategies as st

from trainer import samplers
from trainer.errors import UserError
from trainer.order import epoch_order, scattered
from trainer.samplers import BalancedOrder, ShuffledOrder, mixed, order_digest, weighted_by_class

LONG_TAIL = (np.random.default_rng(0).zipf(1.5, 3000) % 97).astype(np.int32)


def whole_epoch(order, epoch: int = 0) -> np.ndarray:
    return order.of_epoch(epoch)(np.arange(order.num_positions))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
@pytest.mark.parametrize("key", [0, 7, 2**64 - 1])
def test_scattered_places_are_a_permutation(size, key):
    assert sorted(scattered(np.arange(size), size, key).tolist()) == list(range(size))


def test_scattered_permutations_of_four_are_all_about_as_frequent():
    counts = Counter(tuple(scattered(np.arange(4), 4, key * 7919).tolist()) for key in range(2400))
    assert len(counts) == 24
    assert all(55 < count < 145 for count in counts.values())  # 100, standard deviation 10


def test_scattered_places_of_many_groups_are_those_of_each():
    sizes, keys = np.array([5, 900, 5, 1]), np.array([1, 2, 3, 4], dtype=np.uint64)
    places = np.array([4, 777, 0, 0])
    one_by_one = [
        int(scattered(places[i : i + 1], int(sizes[i]), int(keys[i]))[0]) for i in range(len(places))
    ]
    assert scattered(places, sizes, keys).tolist() == one_by_one


def test_shuffled_order_is_the_sorted_one_and_above_its_limit_a_permutation_too(monkeypatch):
    order = ShuffledOrder(1000, seed=3)
    assert np.array_equal(whole_epoch(order, 2), epoch_order(1000, 3, 2))
    monkeypatch.setattr(samplers, "MAX_SORTED", 999)
    large = whole_epoch(order, 2)
    assert sorted(large.tolist()) == list(range(1000))
    assert not np.array_equal(large, whole_epoch(order, 3))
    assert abs(np.corrcoef(large, np.arange(1000))[0, 1]) < 0.15


def test_fifty_million_samples_cost_nothing_to_begin_with():
    for windows in (None, tuple(range(0, 50_000_001, 200_000))):
        order = ShuffledOrder(50_000_000, seed=1, window_starts=windows)
        samples = order.of_epoch(4)(np.arange(25_000_000, 25_000_512))
        assert len(set(samples.tolist())) == 512
        if windows:
            assert samples.max() - samples.min() < 2 * 200_000


def test_windows_come_in_random_order_each_shuffled_each_sample_once():
    starts = (0, 10, 400, 700, 1003)
    order = ShuffledOrder(1003, seed=1, window_starts=starts)
    epochs = [whole_epoch(order, epoch) for epoch in range(4)]
    assert all(sorted(samples.tolist()) == list(range(1003)) for samples in epochs)
    turns = []
    for samples in epochs:
        windows = np.searchsorted(starts, samples, side="right") - 1
        turns.append(tuple(windows[np.flatnonzero(np.diff(windows, prepend=-1))].tolist()))
        assert sorted(turns[-1]) == [0, 1, 2, 3]  # one after another, none twice
    assert len(set(turns)) > 1


@pytest.mark.parametrize(("groups", "samples"), [(6, 4), (20, 2), (9, 1), (4, 16)])
def test_a_balanced_batch_has_distinct_classes_with_so_many_samples_each(groups, samples):
    order = BalancedOrder(LONG_TAIL, 5, groups, samples)
    epoch = whole_epoch(order, 1)
    labels = LONG_TAIL[epoch].reshape(-1, groups, samples)
    assert (labels == labels[:, :, :1]).all()
    assert all(len(set(batch)) == groups for batch in labels[:, :, 0].tolist())
    sizes = np.bincount(LONG_TAIL)
    for label, group in zip(labels[:, :, 0].ravel(), epoch.reshape(-1, samples), strict=True):
        assert len(set(group.tolist())) == min(samples, sizes[label])  # repeats only where it must


def test_a_balanced_epoch_uses_all_samples_that_it_can():
    labels = np.repeat(np.arange(40), 12).astype(np.int32)
    order = BalancedOrder(labels, 0, 8, 4)
    assert order.num_positions == 480
    for epoch in range(3):
        assert sorted(whole_epoch(order, epoch).tolist()) == list(range(480))
    assert not np.array_equal(whole_epoch(order, 0), whole_epoch(order, 1))
    # A class with more groups than there are micro-batches: one in each, other samples in other epochs.
    heavy = np.array([0] * 400 + [1, 2, 3] * 8, dtype=np.int32)
    order = BalancedOrder(heavy, 0, 2, 4)
    assert order.num_batches == 6
    seen = {sample for epoch in range(12) for sample in whole_epoch(order, epoch).tolist()}
    assert len(seen & set(range(400))) > 150


def test_balanced_batches_meet_other_classes_all_the_time():
    labels = np.repeat(np.arange(300), 8).astype(np.int32)
    batches = labels[whole_epoch(BalancedOrder(labels, 0, 10, 2))].reshape(-1, 10, 2)[:, :, 0]
    pairs = Counter(
        tuple(sorted((a, b))) for batch in batches.tolist() for a in batch for b in batch if a < b
    )
    assert max(pairs.values()) <= 3  # of 4 times that each of the two is seen


def test_too_few_classes_for_a_balanced_batch_are_refused():
    with pytest.raises(
        UserError, match=r"data.samples_per_class: a micro-batch of 8 classes x 2 images needs"
    ):
        BalancedOrder(np.repeat(np.arange(7), 50).astype(np.int32), 0, 8, 2)


def test_a_replacement_in_a_balanced_order_is_of_the_same_class():
    order = BalancedOrder(LONG_TAIL, 5, 6, 4)
    for sample in range(0, 300, 7):
        assert LONG_TAIL[order.substitute(sample, 0, sample, 0)] == LONG_TAIL[sample]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_classes_are_drawn_in_proportion_to_a_power_of_their_size(power):
    order = weighted_by_class(LONG_TAIL, 2, power)
    sizes = np.bincount(LONG_TAIL)[np.unique(LONG_TAIL)]
    expected = len(LONG_TAIL) * sizes**power / (sizes**power).sum()
    drawn = np.bincount(LONG_TAIL[whole_epoch(order)])[np.unique(LONG_TAIL)]
    assert np.abs(drawn - expected).max() <= 1
    if power == 1:
        assert sorted(whole_epoch(order, 7).tolist()) == list(range(len(LONG_TAIL)))


def test_a_class_goes_through_all_its_samples_before_any_comes_again():
    order = weighted_by_class(LONG_TAIL, 2, 0.0)
    counts = np.zeros(len(LONG_TAIL), dtype=int)
    for epoch in range(5):
        counts += np.bincount(whole_epoch(order, epoch), minlength=len(LONG_TAIL))
        for label in np.unique(LONG_TAIL):
            of_class = counts[label == LONG_TAIL]
            assert of_class.max() - of_class.min() <= 1


def test_sets_are_mixed_by_weight_and_the_first_is_an_epoch():
    order = mixed([100, 30], [1.0, 0.5], seed=1)
    assert order.num_positions == 150
    counts = np.zeros(130, dtype=int)
    for epoch in range(3):
        samples = whole_epoch(order, epoch)
        assert sorted(samples[samples < 100].tolist()) == list(range(100))
        counts += np.bincount(samples, minlength=130)
    assert (counts[:100] == 3).all()
    assert (counts[100:] == 5).all()


def test_every_order_is_a_function_of_seed_epoch_and_position():
    def orders(seed):
        yield ShuffledOrder(3000, seed)
        yield ShuffledOrder(3000, seed, (0, 1000, 3000))
        yield BalancedOrder(LONG_TAIL, seed, 6, 4)
        yield weighted_by_class(LONG_TAIL, seed, 0.5)
        yield mixed([2000, 1000], [1.0, 1.0], seed)

    for first, again, other in zip(orders(1), orders(1), orders(2), strict=True):
        positions = np.arange(24, 48)
        assert np.array_equal(first.of_epoch(3)(positions), whole_epoch(again, 3)[24:48])
        assert order_digest(first, 3) == order_digest(again, 3)
        assert len({order_digest(first, 3), order_digest(first, 4), order_digest(other, 3)}) == 3


KEYS = st.integers(0, 2**64 - 1)


@fuzz(60)
@given(groups=st.lists(st.tuples(st.integers(1, 150), KEYS), min_size=1, max_size=5))
def test_places_of_groups_of_any_sizes_are_permuted_within_each_group(groups):
    sizes, keys = (np.array(column, dtype=np.uint64) for column in zip(*groups, strict=True))
    of_group = np.repeat(np.arange(len(groups)), sizes.astype(int))
    places = np.concatenate([np.arange(size) for size, _ in groups])
    out = scattered(places, sizes[of_group].astype(np.int64), keys[of_group])
    for group, (size, _) in enumerate(groups):
        assert sorted(out[of_group == group].tolist()) == list(range(size))


@fuzz(60)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8), seed=KEYS, epoch=st.integers(0, 9))
def test_windows_of_any_sizes_come_whole_one_after_another_empty_ones_not_at_all(sizes, seed, epoch):
    starts = (0, *np.cumsum(sizes).tolist())
    samples = whole_epoch(ShuffledOrder(starts[-1], seed, starts), epoch)
    assert sorted(samples.tolist()) == list(range(starts[-1]))
    windows = np.searchsorted(starts, samples, side="right") - 1
    assert len(np.flatnonzero(np.diff(windows, prepend=-1))) == sum(size > 0 for size in sizes)


@fuzz(60)
@given(
    labels=st.lists(st.integers(0, 8), min_size=1, max_size=80),
    groups=st.integers(1, 5),
    samples=st.integers(1, 5),
    seed=KEYS,
)
def test_any_labels_give_balanced_batches_of_distinct_classes_or_are_refused(labels, groups, samples, seed):
    labels_N = np.array(labels, dtype=np.int32)
    if len(set(labels)) < groups:
        with pytest.raises(UserError, match="needs as many classes"):
            BalancedOrder(labels_N, seed, groups, samples)
        return
    chosen = whole_epoch(BalancedOrder(labels_N, seed, groups, samples)).reshape(-1, groups, samples)
    assert len(chosen)
    for batch in chosen:
        assert (labels_N[batch] == labels_N[batch[:, :1]]).all()
        assert len(set(labels_N[batch[:, 0]].tolist())) == groups
        for group in batch:  # a class too small for a group repeats its images as late as it can
            size = labels.count(labels_N[group[0]])
            assert len(set(group.tolist())) == min(samples, size)


@fuzz(40)
@given(parts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=1, max_size=4), seed=KEYS)
def test_a_mixture_of_any_sets_draws_all_images_of_a_set_before_any_again(parts, seed):
    sizes, weights = zip(*parts, strict=True)
    order = mixed(sizes, weights, seed)
    counts = np.bincount(np.concatenate([whole_epoch(order, e) for e in range(3)]), minlength=sum(sizes))
    for of_part in np.split(counts, np.cumsum(sizes)[:-1]):
        assert of_part.max() - of_part.min() <= 1
