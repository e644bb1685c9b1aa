"""The images that a model finds hardest: one class yet far apart, two classes yet close.

Exact, block by block: no N x N matrix exists. Legend: N images of a set, B of a block, D width of a feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024


@dataclass(frozen=True)
class Pairs:
    """The hardest pairs of a set: (cosine, image, image)."""

    positives: list[tuple[float, int, int]]
    """Of one class, and yet far apart; the farthest first, one pair of a class."""
    negatives: list[tuple[float, int, int]]
    """Of two classes, and yet close; the closest first, one pair of two classes."""
    is_wrong_N: Tensor
    """Whether the nearest image is of another class."""


def hardest_pairs(features_ND: Tensor, labels_N: Tensor, count: int) -> Pairs:
    """Find the hardest pairs among all; no N x N matrix is held."""
    size = len(labels_N)
    lowest_N, far_N = torch.full((size,), 2.0), torch.full((size,), -1)
    highest_N, near_N = torch.full((size,), -2.0), torch.full((size,), -1)
    is_wrong_N = torch.zeros(size, dtype=torch.bool)
    for low in range(0, size, _BLOCK):
        block = slice(low, low + _BLOCK)
        cosine_BN = features_ND[block] @ features_ND.T
        same_BN = labels_N[block, None] == labels_N
        other_BN = cosine_BN.masked_fill(same_BN, -2.0)
        highest_N[block], near_N[block] = other_BN.max(1)
        same_BN[torch.arange(len(cosine_BN)), torch.arange(low, low + len(cosine_BN))] = False
        is_wrong_N[block] = highest_N[block] >= cosine_BN.masked_fill(~same_BN, -2.0).amax(1)
        lowest_N[block], far_N[block] = cosine_BN.masked_fill(~same_BN, 2.0).min(1)
    return Pairs(
        _choose(lowest_N, far_N, labels_N, count, lowest_N < 2),
        _choose(highest_N, near_N, labels_N, count, highest_N > -2, descending=True),
        is_wrong_N,
    )


def _choose(
    cosine_N: Tensor,
    partner_N: Tensor,
    labels_N: Tensor,
    count: int,
    is_there_N: Tensor,
    descending: bool = False,
) -> list[tuple[float, int, int]]:
    """Take the first pair of every two classes, or of every class."""
    chosen: dict[frozenset[int], tuple[float, int, int]] = {}
    for i in cosine_N.argsort(descending=descending, stable=True).tolist():
        if len(chosen) == count:
            break
        if is_there_N[i]:
            j = int(partner_N[i])
            classes = frozenset((int(labels_N[i]), int(labels_N[j])))
            chosen.setdefault(classes, (float(cosine_N[i]), i, j))
    return list(chosen.values())
