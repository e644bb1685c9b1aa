"""Which sample is at which position of an epoch: shuffled, balanced by class, weighted, or mixed.

An order is a pure function of (seed, epoch, position). It knows nothing of ranks and workers: a global batch
is a slice of it, and only then cut (``trainer.order``), so none of these orders depends on them::

    PlainOrder       every sample once, as they lie
    ShuffledOrder    every sample once, all of them in random order, or window after window of shards
    BalancedOrder    groups of K samples of one class; the classes of a global micro-batch are distinct
    SharedOrder      groups of samples (classes, or data sets) with a fixed share of every epoch each

Dimensions: N samples, C classes, B positions asked for, G groups of an epoch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.order import (
    EpochOrder,
    Integers,
    Order,
    epoch_key,
    epoch_order,
    fold,
    replacement_key,
    scattered,
    splitmix64,
)

MAX_SORTED = 20_000_000  # above, sorting costs seconds and gigabytes an epoch, on every rank


@dataclass(frozen=True)
class PlainOrder:
    """Every sample at its own place: one pass over a test set."""

    num_positions: int

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""
        return lambda positions_B: positions_B

    def substitute(self, sample: int, epoch: int, position: int, attempt: int) -> int:
        """Return the sample itself: nothing takes its place in a test."""
        return sample


@dataclass(frozen=True)
class ShuffledOrder:
    """Every sample once in an epoch.

    Up to ``MAX_SORTED`` samples they are sorted by a hash; above, places are scattered one by one, which
    needs no memory and no time at the beginning of an epoch. With ``window_starts`` (first sample of each
    window, and their number N at the end) windows come in random order and are shuffled one by one, so that
    what lies together on a slow disk is read together.
    """

    num_samples: int
    seed: int
    window_starts: tuple[int, ...] | None = None

    @property
    def num_positions(self) -> int:
        """Positions of an epoch."""
        return self.num_samples

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""
        key = epoch_key(self.seed, epoch)
        if self.window_starts is not None:
            return self._windowed(np.array(self.window_starts), key)
        if self.num_samples > MAX_SORTED:
            return lambda positions_B: scattered(positions_B, self.num_samples, key)
        order_N = epoch_order(self.num_samples, self.seed, epoch)
        return lambda positions_B: order_N[positions_B]

    def substitute(self, sample: int, epoch: int, position: int, attempt: int) -> int:
        """Return any sample."""
        return replacement_key(self.seed, epoch, position, attempt) % self.num_samples

    def _windowed(self, starts: Integers, key: int) -> EpochOrder:
        sizes = np.diff(starts)
        turns = np.argsort(splitmix64(np.arange(len(sizes), dtype=np.uint64) ^ np.uint64(key)), kind="stable")
        ends = np.cumsum(sizes[turns])

        def order(positions_B: Integers) -> Integers:
            turn_B = np.searchsorted(ends, positions_B, side="right")
            window_B = turns[turn_B]
            places_B = positions_B - (ends[turn_B] - sizes[window_B])
            keys_B = splitmix64(window_B.astype(np.uint64) ^ np.uint64(splitmix64(key)))
            return starts[window_B] + scattered(places_B, sizes[window_B], keys_B)

        return order


@dataclass(frozen=True, eq=False)
class BalancedOrder:
    """P x K: positions come in groups of K samples of one class, P groups to a global micro-batch.

    The classes of a global micro-batch are distinct, hence those of a rank's share of it too, and a share
    that is a multiple of K has whole groups: neither depends on the number of ranks. It does depend on the
    global batch size and on accumulation, through P.

    In an epoch the samples of a class are shuffled and cut into groups of K; a last group that is too short
    is filled up from the class's first. A class can be in a micro-batch only once, so of one with more
    groups than the epoch has micro-batches some are left out, others in other epochs; so is the remainder
    of the groups that fill no micro-batch. ``_deal`` is how groups come to micro-batches.
    """

    labels_N: NDArray[np.int32]
    seed: int
    groups_per_batch: int
    """P."""
    samples_per_group: int
    """K."""

    def __post_init__(self) -> None:
        if self.num_batches == 0:
            raise UserError(
                f"data.samples_per_class: a micro-batch of {self.groups_per_batch} classes x "
                f"{self.samples_per_group} images needs as many classes, there are {len(self._classes.sizes)}"
            )

    @cached_property
    def _classes(self) -> "_Groups":
        return _Groups.by_label(self.labels_N)

    @cached_property
    def num_batches(self) -> int:
        """Micro-batches of an epoch: a class in each at most once."""
        groups_C = -(-self._classes.sizes // self.samples_per_group)
        batches = int(groups_C.sum()) // self.groups_per_batch
        while (fewer := int(np.minimum(groups_C, batches).sum()) // self.groups_per_batch) < batches:
            batches = fewer
        return batches

    @property
    def num_positions(self) -> int:
        """Positions of an epoch."""
        return self.num_batches * self.groups_per_batch * self.samples_per_group

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch; takes time and memory in proportion to N / K."""
        key = epoch_key(self.seed, epoch)
        classes_G, turns_G = self._deal(key)

        def order(positions_B: Integers) -> Integers:
            group_B, within_B = np.divmod(positions_B, self.samples_per_group)
            class_B = classes_G[group_B]
            place_B = (turns_G[group_B] * self.samples_per_group + within_B) % self._classes.sizes[class_B]
            keys_B = splitmix64(class_B.astype(np.uint64) ^ np.uint64(splitmix64(key)))
            return self._classes.members(class_B, place_B, keys_B)

        return order

    def substitute(self, sample: int, epoch: int, position: int, attempt: int) -> int:
        """Return a sample of the same class, as long as there is hope."""
        key = replacement_key(self.seed, epoch, position, attempt)
        members = np.flatnonzero(self.labels_N == self.labels_N[sample])
        return int(members[key % len(members)]) if attempt < 4 else key % len(self.labels_N)

    def _deal(self, key: int) -> tuple[Integers, Integers]:
        """Return the class of every group of an epoch, and its number within the class.

        The groups of all classes, in random order of the classes, are dealt like cards, one to each
        micro-batch in turn: neighbours, so those of one class, come to different ones. So that the
        same classes do not meet in one micro-batch after another, every round of dealing goes through the
        micro-batches in a random order of its own; a class that reaches into the next round gets those first
        that it has not been in.
        """
        batches, rounds = self.num_batches, self.groups_per_batch
        groups_C = np.minimum(-(-self._classes.sizes // self.samples_per_group), batches)
        order_C = np.argsort(_hashes(len(groups_C), fold(key, 1)), kind="stable")
        class_of = np.repeat(order_C, groups_C[order_C])[: batches * rounds]
        first = np.cumsum(groups_C[order_C]) - groups_C[order_C]
        turn_of = np.arange(len(class_of)) - np.repeat(first, groups_C[order_C])[: batches * rounds]
        dealt = np.empty((batches, rounds), dtype=np.int64)
        seats = np.arange(batches)
        for r in range(rounds):
            before, here = (
                class_of[(r - 1) * batches : r * batches],
                class_of[r * batches : (r + 1) * batches],
            )
            seats = _seats(seats, before, here, fold(key, 2, r))
            dealt[seats, r] = np.arange(r * batches, (r + 1) * batches)
        groups = dealt.reshape(-1)
        return class_of[groups], turn_of[groups]


def _seats(seats_before: Integers, before: Integers, here: Integers, key: int) -> Integers:
    """Return a random permutation: the micro-batch to which each group of a round is dealt.

    ``before`` and ``here`` are the classes of the groups of the last round, which went to ``seats_before``,
    and of this one.
    """
    seats = np.argsort(_hashes(len(here), key), kind="stable")
    reaching = here == here[0]
    taken = (
        np.isin(seats, seats_before[before == here[0]]) if len(before) else np.zeros(len(here), dtype=bool)
    )
    first = seats[~taken][: reaching.sum()]
    return np.concatenate([first, seats[~np.isin(seats, first)]])


@dataclass(frozen=True, eq=False)
class SharedOrder:
    """Groups of samples, each with a fixed number of draws in every epoch, in random order.

    A group goes through its own samples in random order, epoch after epoch: all of them once before any of
    them again. Needs no memory beyond the members of the groups and no time at the beginning of an epoch.
    """

    groups: "_Groups"
    draws: Integers
    """Of each group in an epoch."""
    seed: int

    @cached_property
    def _ends(self) -> Integers:
        return np.cumsum(self.draws)

    @property
    def num_positions(self) -> int:
        """Positions of an epoch."""
        return int(self._ends[-1])

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""
        key, ends = epoch_key(self.seed, epoch), self._ends

        def order(positions_B: Integers) -> Integers:
            slot_B = scattered(positions_B, self.num_positions, key)
            group_B = np.searchsorted(ends, slot_B, side="right")
            draw_B = epoch * self.draws[group_B] + slot_B - (ends[group_B] - self.draws[group_B])
            pass_B, place_B = np.divmod(draw_B, self.groups.sizes[group_B])
            words_B = (group_B << 32 | pass_B).astype(np.uint64)
            keys_B = splitmix64(splitmix64(words_B) ^ np.uint64(fold(epoch_key(self.seed, 0), 1)))
            return self.groups.members(group_B, place_B, keys_B)

        return order

    def substitute(self, sample: int, epoch: int, position: int, attempt: int) -> int:
        """Return any sample of any group."""
        return replacement_key(self.seed, epoch, position, attempt) % int(self.groups.sizes.sum())


@dataclass(frozen=True, eq=False)
class _Groups:
    """Samples in groups: those of group g are the members at starts[g] .. starts[g] + sizes[g] - 1."""

    starts: Integers
    sizes: Integers
    members_N: Integers | None = None
    """None where they are 0, 1, 2, ...: groups lie one after another."""

    @classmethod
    def by_label(cls, labels_N: NDArray[np.int32]) -> "_Groups":
        """One group for every label that occurs."""
        members_N = np.argsort(labels_N, kind="stable")
        _, starts, sizes = np.unique(labels_N[members_N], return_index=True, return_counts=True)
        return cls(starts, sizes, members_N)

    @classmethod
    def by_part(cls, part_sizes: Sequence[int]) -> "_Groups":
        """One group for every data set of several, one after another."""
        sizes = np.array(part_sizes, dtype=np.int64)
        return cls(np.cumsum(sizes) - sizes, sizes)

    def members(self, group_B: Integers, place_B: Integers, keys_B: NDArray[np.uint64]) -> Integers:
        """Return the samples at places of their groups, each group shuffled by its key."""
        at_B = self.starts[group_B] + scattered(place_B, self.sizes[group_B], keys_B)
        return at_B if self.members_N is None else self.members_N[at_B]


def weighted_by_class(labels_N: NDArray[np.int32], seed: int, power: float) -> SharedOrder:
    """Return an epoch of about N draws in which a class with n samples is drawn in proportion to n ** power.

    1 is the data's own frequencies, 0.5 the square root, 0 every class as often as any other.
    """
    groups = _Groups.by_label(labels_N)
    return SharedOrder(groups, _shares(groups.sizes.astype(float) ** power, len(labels_N)), seed)


def mixed(part_sizes: Sequence[int], weights: Sequence[float], seed: int) -> SharedOrder:
    """Return draws from several data sets in proportion to their weights; an epoch is the first one's."""
    total = round(part_sizes[0] * sum(weights) / weights[0])
    return SharedOrder(_Groups.by_part(part_sizes), _shares(np.array(weights), total), seed)


def _shares(weights: NDArray[np.float64], total: int) -> Integers:
    """Return whole numbers, at least 1, in proportion to the weights, that add up to about ``total``."""
    return np.maximum(1, np.rint(weights * (total / weights.sum()))).astype(np.int64)


def order_digest(order: Order, epoch: int, count: int = 4096) -> str:
    """Return a hash of the first and of evenly spaced samples of an epoch, to compare ranks by."""
    last = order.num_positions - 1
    positions = np.concatenate(
        [np.arange(min(count, last + 1)), np.linspace(0, last, count).astype(np.int64)]
    )
    samples = order.of_epoch(epoch)(positions)
    return hashlib.sha256(
        f"{order.num_positions} ".encode("ascii") + samples.astype("<i8").tobytes()
    ).hexdigest()


def _hashes(count: int, key: int) -> NDArray[np.uint64]:
    return splitmix64(splitmix64(np.arange(count, dtype=np.uint64)) ^ np.uint64(key))
