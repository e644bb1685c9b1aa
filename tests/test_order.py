import math

import numpy as np
import pytest
from hostile import fuzz
from hypothesis import given
from hypothesis import strategies as st

from trainer.order import Position, epoch_order, fold, rank_positions, sample_key, splitmix64


def longhand_splitmix64(word: int) -> int:
    z = (word + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_hash_gives_the_published_splitmix64_stream():
    # First outputs of the reference C code for the states 0 and 1234567.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


def test_hash_of_an_array_is_the_hash_of_each_word():
    words = [0, 1, 2**31, 2**63, 2**64 - 1]
    hashed = splitmix64(np.array(words, dtype=np.uint64))
    assert hashed.dtype == np.uint64
    assert (
        hashed.tolist()
        == [splitmix64(word) for word in words]
        == [longhand_splitmix64(word) for word in words]
    )


def test_order_is_the_sorting_of_longhand_keys():
    epoch_key = longhand_splitmix64(longhand_splitmix64(longhand_splitmix64(1) ^ 7) ^ 3)
    keys = [longhand_splitmix64(longhand_splitmix64(i) ^ epoch_key) for i in range(50)]
    assert epoch_order(50, seed=7, epoch=3).tolist() == sorted(range(50), key=keys.__getitem__)


def test_order_and_keys_have_not_changed_since_the_first_release():
    # A change here changes every resumed run: raise the data format's version instead.
    assert epoch_order(10, seed=0, epoch=0).tolist() == [1, 9, 7, 0, 8, 6, 4, 2, 5, 3]
    assert epoch_order(10, seed=1, epoch=5).tolist() == [9, 5, 4, 1, 3, 6, 2, 8, 7, 0]
    assert sample_key(0, 0, 0) == 0x90A5CB3B55B40ACF
    assert sample_key(1, 2, 3) == 0xFDBB2E4A8586DE64


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    before = np.random.get_state()[1].copy()
    order = epoch_order(1000, seed=4, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=4, epoch=2))
    assert not np.array_equal(order, epoch_order(1000, seed=4, epoch=3))
    assert not np.array_equal(order, epoch_order(1000, seed=5, epoch=2))
    assert not np.array_equal(order, epoch_order(1000, seed=2, epoch=4))
    assert np.array_equal(before, np.random.get_state()[1])


def test_order_without_shuffle_is_the_data_set_own():
    assert epoch_order(5, seed=1, epoch=1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_order_is_uniform_over_places():
    # Mean place of sample 0 over 400 epochs of 100 samples: 49.5 with standard error 28.9 / 20 = 1.4.
    places = [epoch_order(100, seed=0, epoch=epoch).tolist().index(0) for epoch in range(400)]
    assert abs(np.mean(places) - 49.5) < 5
    assert len(set(places)) > 90


def test_sample_keys_differ_for_every_argument_and_fit_64_bits():
    keys = {sample_key(*words) for words in np.ndindex(8, 8, 8)}
    assert len(keys) == 512
    assert all(0 <= key < 2**64 for key in keys)
    assert fold(1, 2) != fold(2, 1)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_micro_batch_over_all_ranks_is_the_same_slice_for_every_world(accumulation):
    for world_size in (1, 2, 3, 4):
        ranks = [
            rank_positions(48, global_batch=72, accumulation=accumulation, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        micro = 72 // accumulation // world_size
        for a in range(accumulation):
            over_ranks = np.concatenate([mine[a * micro : (a + 1) * micro] for mine in ranks])
            first = 48 + a * 72 // accumulation
            assert over_ranks.tolist() == list(range(first, first + 72 // accumulation))


def test_position_drops_the_tail_and_goes_on_with_the_next_epoch():
    position = Position()
    seen = []
    for _ in range(5):
        seen.append((position.epoch, position.consumed))
        position = position.advance(global_batch=4, num_samples=10)
    assert seen == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]


def test_position_before_a_tail_too_short_for_another_batch_size_is_the_next_epoch():
    assert Position(2, 8).normalised(global_batch=2, num_samples=10) == Position(2, 8)
    assert Position(2, 8).normalised(global_batch=3, num_samples=10) == Position(3, 0)


@fuzz(60)
@given(data=st.data())
def test_any_two_worlds_see_each_position_of_an_epoch_once_and_in_its_order(data):
    """Training begins on one number of ranks and goes on on another, after any step."""
    worlds = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)), "worlds")
    accumulation = data.draw(st.integers(1, 3), "accumulation")
    micro_batch = math.lcm(*worlds) * data.draw(st.integers(1, 3), "share")
    batch = accumulation * micro_batch
    num_samples = batch + data.draw(st.integers(0, 3 * batch), "more")
    steps = num_samples // batch
    resumed_at = data.draw(st.integers(0, steps), "resumed_at")
    position, seen = Position(), []
    for step in range(steps):
        world_size = worlds[step >= resumed_at]
        of_ranks = [
            rank_positions(
                position.consumed,
                global_batch=batch,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
            ).reshape(accumulation, -1)
            for rank in range(world_size)
        ]
        assert len({mine.shape for mine in of_ranks}) == 1
        seen += np.concatenate(of_ranks, axis=1).reshape(-1).tolist()
        position = position.advance(batch, num_samples)
    assert seen == list(range(steps * batch))
    assert position == Position(1, 0)
    assert len(set(epoch_order(num_samples, 0, 0)[seen].tolist())) == len(seen)


@fuzz(60)
@given(num_samples=st.integers(1, 300), batches=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_batches_of_any_sizes_one_after_another_repeat_nothing_within_an_epoch(num_samples, batches):
    position, seen = Position(), []
    for batch in (min(batch, num_samples) for batch in batches):
        start = position.normalised(batch, num_samples)
        assert start in (position, Position(position.epoch + 1, 0))
        assert start.consumed + batch <= num_samples
        seen += [(start.epoch, start.consumed + i) for i in range(batch)]
        position = start.advance(batch, num_samples)
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)
