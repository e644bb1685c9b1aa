"""Open-set verification over all N (N - 1) / 2 pairs of a set, at the speed of the matrix product.

``metrics.verification`` sorts every score: exact to the last bit, and minutes for 20 000 images. Here scores
fall into bins of width 2^-14 of a cosine, and a figure is exact but for that: it is the figure of scores
rounded down to a multiple of 2^-14 = 6.1e-5, so a threshold is off by less than one bin. Memory is the
features, one tile, and two histograms.

Scores are float32 products, whose rounding (below 1e-6) may move a score over the edge of a bin. Tiles are
the same on any number of ranks, and so is the histogram, as long as the machines are of one kind.

Dimensions: N images, D feature, B x C a tile, T bins.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.roc import Verification, curve_of_counts
from trainer.tiles import ALONE, Images, Sharing, blocks, by_class, count_pairs, overlap, share

BINS_OF_ONE = 2**14
"""Bins of a cosine interval of length 1; the width of a bin is 1 / BINS_OF_ONE."""
BLOCK = 1024  # 4 MB of scores: they stay in the cache between product and histogram

_SLACK = 4  # bins beyond +-1, for features whose length is 1 up to rounding
NUM_BINS = 2 * (BINS_OF_ONE + _SLACK)


def all_pairs(
    features_ND: Tensor,
    labels_N: Tensor,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    sharing: Sharing = ALONE,
    block: int = BLOCK,
) -> Verification:
    """Compare all pairs, to one bin. Every rank must call it and gets the same."""
    images = by_class(features_ND, labels_N)
    num_genuine, num_impostor = count_pairs(images.labels)
    genuine_T, all_T = sharing.total(_histograms(images, sharing, block)).cpu().numpy()
    assert (genuine_T.sum(), all_T.sum()) == (num_genuine, num_genuine + num_impostor)
    impostor_T = all_T - genuine_T
    reaching_T = impostor_T[::-1].cumsum()[::-1]
    edges_T = (np.arange(NUM_BINS + 1) - NUM_BINS // 2) / BINS_OF_ONE
    used_T = genuine_T > 0
    return curve_of_counts(
        edges_T[:-1][used_T],
        edges_T[1:][used_T],
        genuine_T[used_T],
        (reaching_T - impostor_T)[used_T],
        reaching_T[used_T],
        num_impostor,
        fars,
    )


def _histograms(images: Images, sharing: Sharing, block: int) -> Tensor:
    """Return the counts of this rank's tiles, int64: genuine pairs, and all pairs, of each bin."""
    pieces = list(blocks(len(images), block))
    counts_2T = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=images.features.device)
    for rows, columns in share(itertools.combinations_with_replacement(pieces, 2), sharing.part):
        left, right = images[rows], images[columns]
        bins_BC = fine_bins(left, right)
        if rows == columns:
            counts_2T[1] += count_bins(bins_BC.masked_select(left.ids[:, None] < right.ids))
        else:
            counts_2T[1] += count_bins(bins_BC.view(-1))
        if overlap(left, right):
            same_BC = (left.labels[:, None] == right.labels) & (left.ids[:, None] < right.ids)
            counts_2T[0] += count_bins(bins_BC.masked_select(same_BC))
    return counts_2T


def fine_bins(left: Images, right: Images) -> Tensor:
    """Return the bin of every pair of a tile, int32."""
    scaled_BD = left.features * BINS_OF_ONE  # a power of two: exact
    return (scaled_BD @ right.features.T).add_(NUM_BINS // 2).to(torch.int32)


def count_bins(bins: Tensor) -> Tensor:
    """Count how many pairs fell into each bin."""
    return torch.bincount(bins, minlength=NUM_BINS)


def genuine_by_class(features_ND: Tensor, labels_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine of each genuine pair and its class: for intervals, where classes are drawn."""
    images = by_class(features_ND, labels_N)
    counts_K = torch.unique_consecutive(images.labels, return_counts=True)[1]
    scores: list[np.ndarray] = []
    for own in images.features.split(counts_K.tolist()):
        i, j = torch.triu_indices(len(own), len(own), 1, device=own.device)
        found = (own.double() @ own.double().T).float()[i, j]
        scores.append(found.cpu().numpy())
    return np.concatenate(scores), np.repeat(np.arange(len(scores)), [len(part) for part in scores])
