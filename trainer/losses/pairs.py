"""Pairs of the global batch, each seen by one rank: the distances from its own images to all.

Legend: N images of this rank (the anchors), B of all ranks, D width of the embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Pairs(NamedTuple):
    """What lies between an anchor of this rank and every image of the batch."""

    distance_NB: Tensor
    """Euclidean, with gradient; 0 at equal points has the gradient 0."""
    is_positive_NB: Tensor
    """Same class, and not the anchor itself."""
    is_negative_NB: Tensor
    """Other class."""


def own_pairs(x_BD: Tensor, labels_B: Tensor, group: ProcessGroup) -> Pairs:
    """Return the pairs whose first image is this rank's; communicates nothing.

    The ranks share the batch as evenly as can be: in training each has the images that it embedded.
    """
    own_N = own_images(len(labels_B), group, x_BD.device)
    # Differences, not |x|^2 + |y|^2 - 2 x y, in which float32 loses the distance of near points.
    distance_NB = torch.cdist(x_BD[own_N], x_BD, compute_mode="donot_use_mm_for_euclid_dist")
    is_same_NB = labels_B[own_N][:, None] == labels_B
    is_negative_NB = ~is_same_NB
    is_self_NB = own_N[:, None] == torch.arange(len(labels_B), device=x_BD.device)
    return Pairs(distance_NB, is_same_NB & ~is_self_NB, is_negative_NB)


def own_images(batch: int, group: ProcessGroup, device: torch.device) -> Tensor:
    """Return which images of the batch are this rank's."""
    return torch.arange(batch, device=device).tensor_split(group.size())[group.rank()]
