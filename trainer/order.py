"""In which order samples are seen: a pure function of (seed, epoch), the same on every rank, for ever.

An epoch is one permutation of all samples, cut into global batches; a global batch is cut into
micro-batches, and only those are cut by ranks. So the samples of micro-batch a, over all ranks, never
depend on how many ranks there are::

    order      |<------- global batch of step 0 ------->|<---- step 1 ...           tail: dropped
    micro a    |       a = 0       |       a = 1       |
    rank r     | r=0 | r=1 | r=2   | r=0 | r=1 | r=2   |

The hash is our own because the streams of ``numpy.random.Generator`` and ``torch.randperm`` may change
with their versions (NEP 19), and a resumed run must go on with the order it began with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Words = TypeVar("Words", int, NDArray[np.uint64])
Integers = NDArray[np.int64]
EpochOrder = Callable[[Integers], Integers]
"""From positions_B within an epoch to samples_B."""

_MASK = 0xFFFFFFFFFFFFFFFF
# The first word of every key says what the key is for: no draw is used twice.
_FOR_ORDER, _FOR_AUGMENTATION = 1, 2
_FOR_REPLACEMENT = 3
_FEISTEL_ROUNDS = 6


class Order(Protocol):
    """Which sample is at which position of an epoch (``trainer.samplers`` has them)."""

    @property
    def num_positions(self) -> int:
        """Positions of an epoch."""

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""

    def substitute(self, sample: int, epoch: int, position: int, attempt: int) -> int:
        """Return the sample that takes the place of a bad one; ``attempt`` counts from 0."""


def splitmix64(words: Words) -> Words:
    """Mix 64-bit words (an int, or an array of uint64): a bijection that looks random (Steele, 2014)."""
    mixed = (words + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return cast(Words, mixed ^ (mixed >> 31))


def fold(*words: int) -> int:
    """Return one 64-bit key of several words; their order matters."""
    key = 0
    for word in words:
        key = splitmix64(key ^ (word & _MASK))
    return key


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
    """Return the samples of one epoch in the order they are seen: the data set's own without ``shuffle``."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    words = splitmix64(np.arange(num_samples, dtype=np.uint64))
    keys = splitmix64(words ^ np.uint64(epoch_key(seed, epoch)))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def scattered(places_N: NDArray[np.int64], sizes: NDArray[np.int64] | int, key: Words) -> NDArray[np.int64]:
    """Return where a random permutation of 0 .. size - 1 puts each place, without making the permutation.

    ``key`` (64 bits) chooses the permutation; both may differ from place to place. A Feistel network over
    the digits of a place in base a, the smallest with a * a >= size, is a bijection of 0 .. a * a - 1; what
    falls outside is sent round again until it falls inside. Costs a few hashes a place and no memory.
    """
    sizes_N = np.broadcast_to(np.asarray(sizes, dtype=np.uint64), places_N.shape)
    keys_N = np.broadcast_to(np.asarray(key, dtype=np.uint64), places_N.shape)
    out_N = np.array(places_N, dtype=np.uint64)
    outside = np.arange(len(out_N))
    while len(outside):
        base, keys = np.ceil(np.sqrt(sizes_N[outside])).astype(np.uint64), keys_N[outside]
        high, low = out_N[outside] // base, out_N[outside] % base
        for turn in range(_FEISTEL_ROUNDS):
            mixed = splitmix64(splitmix64(low ^ keys) ^ np.uint64(turn))
            high, low = low, (high + mixed % base) % base
        out_N[outside] = high * base + low
        outside = outside[out_N[outside] >= sizes_N[outside]]
    return out_N.astype(np.int64)


def epoch_key(seed: int, epoch: int) -> int:
    """Return the 64-bit key of an epoch's order."""
    return fold(_FOR_ORDER, seed, epoch)


def replacement_key(seed: int, epoch: int, position: int, attempt: int) -> int:
    """Return the 64-bit key from which the sample is drawn that takes the place of a bad one."""
    return fold(_FOR_REPLACEMENT, seed, epoch, position, attempt)


def sample_key(seed: int, epoch: int, position: int) -> int:
    """Return the 64-bit key from which the augmentation of one sample is drawn."""
    return fold(_FOR_AUGMENTATION, seed, epoch, position)


@dataclass(frozen=True)
class Position:
    """How far training is in its data: the whole state of the loader, equal on every rank."""

    epoch: int = 0
    consumed: int = 0
    """Samples of this epoch already trained on, over all ranks."""

    def advance(self, global_batch: int, num_samples: int) -> "Position":
        """Return the position one step later."""
        return Position(self.epoch, self.consumed + global_batch).normalised(global_batch, num_samples)

    def normalised(self, global_batch: int, num_samples: int) -> "Position":
        """Return the start of the next epoch if this one has no whole global batch left, else itself."""
        if self.consumed + global_batch <= num_samples:
            return self
        return Position(self.epoch + 1, 0)


def rank_positions(
    consumed: int, *, global_batch: int, accumulation: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Return the positions within the epoch that a rank trains on in the step after ``consumed`` samples.

    They are the rank's micro-batches one after another: a = 0, then a = 1, ...
    """
    positions_B = np.arange(consumed, consumed + global_batch, dtype=np.int64)
    return positions_B.reshape(accumulation, world_size, -1)[:, rank].reshape(-1)
