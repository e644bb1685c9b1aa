"""Confidence intervals by resampling identities, not images: photos of one person err together.

A statistic is asked again and again with how often each of the K identities was drawn. Each draw is a
function of (seed, number of the draw), so that every rank computes the same interval without a word.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from trainer.order import fold

Counts = NDArray[np.int64]


def draws(num_identities: int, resamples: int, seed: int = 0) -> Iterator[Counts]:
    """Yield, for each draw of as many identities as there are, how often each was drawn."""
    for draw in range(resamples):
        generator = np.random.Generator(np.random.PCG64(fold(seed, draw)))
        drawn_K = generator.integers(num_identities, size=num_identities)
        yield np.bincount(drawn_K, minlength=num_identities)


def percentiles(values_R: NDArray, level: float = 0.95) -> tuple[float, float]:
    """Return both ends of the middle ``level`` of a statistic's draws; those that are NaN are left out."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def interval(
    statistic: Callable[[Counts], float], num_identities: int, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of ``statistic(counts_K)``; draws for which it is NaN are left out."""
    return percentiles(np.array([statistic(counts_K) for counts_K in draws(num_identities, resamples, seed)]))


def mean_interval(
    values_N: NDArray, identities_N: NDArray, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of values, one for each image (or query) of an identity."""
    names_K, group_N = np.unique(identities_N, return_inverse=True)
    sums_K = np.bincount(group_N, weights=values_N)
    sizes_K = np.bincount(group_N)
    return interval(lambda k: float(k @ sums_K / (k @ sizes_K)), len(names_K), resamples, seed)
