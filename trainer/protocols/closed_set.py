"""Closed set: which of K known classes is it? The nearest of K centroids, by angle and by distance.

By angle, centroids are directions (rows of the head, or class means of features). By distance, they are
points: class means of embeddings, as the center-loss papers judge.

Dimensions: N images, K classes, S sub-centroids, R = K S rows, D embedding, B images of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UserError
from trainer.tiles import ALONE, Sharing, blocks, share


@dataclass(frozen=True)
class ClosedSet:
    """What became of every image."""

    hits: dict[str, Tensor]
    """``accuracy``, ``top5``, ``accuracy_euclidean``, ... -> float64, 1 for a hit, one for each image."""
    predicted_N: Tensor
    """The nearest centroid by angle."""

    def confusion(self, labels_N: Tensor, num_classes: int) -> Tensor:
        """Return K x K counts: rows are true classes, columns are predicted ones."""
        flat_N = labels_N.to(self.predicted_N.device) * num_classes + self.predicted_N
        return torch.bincount(flat_N, minlength=num_classes**2).view(num_classes, num_classes)


def closed_set(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    centroids_KD: Tensor,
    ks: Sequence[int] = (1, 5),
    sharing: Sharing = ALONE,
    block: int = 256,
) -> ClosedSet:
    """Compare every embedding with every centroid. Top k: fewer than k other classes are as near.

    Centroids may be K x S x D: a class of S sub-centroids is as near as its nearest.

    Scores are float64 rounded to float32, so a tie counts against the model. Every rank must call it.
    """
    num_classes = len(centroids_KD)
    width = embeddings_ND.shape[1]
    if centroids_KD.shape[-1] != width:
        raise UserError(f"centroids of width {centroids_KD.shape[-1]}, embeddings of width {width}")
    wrong = labels_N[(labels_N < 0) | (labels_N >= num_classes)]
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} has no centroid: there are {num_classes} classes")
    labels_N, ks = labels_N.to(embeddings_ND.device), [k for k in ks if k < num_classes]
    points_KSD = centroids_KD.to(embeddings_ND.device).double().view(num_classes, -1, width)
    points_RD = points_KSD.flatten(0, 1)
    directions_RD = F.normalize(points_RD)
    squares_R = points_RD.square().sum(1)
    rivals_N2 = torch.zeros(len(labels_N), 2, dtype=torch.int64, device=embeddings_ND.device)
    predicted_N = torch.zeros_like(labels_N)
    for rows in share(blocks(len(labels_N), block), sharing.part):
        embeddings_BD = embeddings_ND[rows].double()
        by_angle_BR = F.normalize(embeddings_BD) @ directions_RD.T
        by_distance_BR = 2 * embeddings_BD @ points_RD.T - squares_R  # |e|^2 is the same for all
        by_angle_BK, by_distance_BK = (
            scores_BR.float().unflatten(1, (num_classes, -1)).amax(dim=2)
            for scores_BR in (by_angle_BR, by_distance_BR)
        )
        predicted_N[rows] = by_angle_BK.argmax(dim=1)
        rivals_N2[rows, 0] = _count_rivals(by_angle_BK, labels_N[rows])
        rivals_N2[rows, 1] = _count_rivals(by_distance_BK, labels_N[rows])
    rivals_N2 = sharing.total(rivals_N2)
    hits = {}
    for column, suffix in enumerate(("", "_euclidean")):
        for k in ks:
            name = ("accuracy" if k == 1 else f"top{k}") + suffix
            hits[name] = (rivals_N2[:, column] < k).double()
    return ClosedSet(hits, sharing.total(predicted_N))


def class_means(embeddings_ND: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Return K x D means, float64. Raises UserError for a class without images."""
    counts_K = torch.bincount(labels_N, minlength=num_classes)
    if (counts_K == 0).any():
        raise UserError(f"class {int((counts_K == 0).int().argmax())} has no image to make a centroid of")
    sums_KD = embeddings_ND.new_zeros(num_classes, embeddings_ND.shape[1], dtype=torch.float64)
    return sums_KD.index_add_(0, labels_N, embeddings_ND.double()) / counts_K[:, None]


def _count_rivals(scores_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Count the other classes that score at least as high as the right one."""
    own_B1 = scores_BK.gather(1, labels_B[:, None])
    return (scores_BK >= own_B1).sum(dim=1) - 1
