"""How good features are: closed-set accuracy, verification and identification, exact and in bounded memory.

Every function takes unit features, one row per image, and integer labels: all of them, in the same order, on
every rank. How ranks share the work, and why figures are equal on any number of them, is in ``tiles``.

A tie counts against the model (in ``auc``, half): one that gives every image the same feature recognises
nobody, not everybody.

Dimensions: N images, D feature, K classes, B images of a block, G of a block of the gallery, T distinct
genuine scores.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.errors import UserError
from trainer.roc import Verification, curve_of_counts
from trainer.tiles import (
    BLOCK,
    Images,
    Tile,
    alone,
    blocks,
    by_class,
    cosines,
    count_pairs,
    overlap,
    share,
)


def nearest_centroid(
    features_ND: Tensor,
    labels_N: Tensor,
    centroids_KD: Tensor,
    part: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = alone,
    block: int = BLOCK,
) -> float:
    """Return the fraction of images whose own centroid has a higher cosine than every other centroid.

    Label k means row k of the centroids, which need not be of unit length (a normalised copy is made).
    """
    images = by_class(features_ND, labels_N)
    num_classes, device = len(centroids_KD), features_ND.device
    for label in (int(images.labels[0]), int(images.labels[-1])):
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} has no centroid: there are {num_classes} classes")
    centroids = Images(
        functional.normalize(centroids_KD.to(device).float(), dim=1),
        torch.arange(num_classes, device=device),
        torch.full((num_classes,), -1, device=device),
    )
    hits = torch.zeros(1, dtype=torch.int64, device=device)
    for rows in share(blocks(len(images), block), part):
        hits += (_count_rivals(images[rows], centroids, block) == 0).sum()
    return int(total(hits)) / len(labels_N)


def identification(
    features_ND: Tensor,
    labels_N: Tensor,
    part: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = alone,
    ranks: Sequence[int] = (1, 5),
    block: int = BLOCK,
) -> dict[str, float]:
    """Look every image up among all others (leave one out): is one of the nearest k of its class?

    Returns ``rank1``, ``rank5`` (fractions of the probes) and ``num_probes``: images whose class has two or
    more. All images are in the gallery. Among equals, other classes come first: rank k is a hit if fewer
    than k images of other classes have a cosine >= that of the nearest image of the same class.
    """
    images = by_class(features_ND, labels_N)
    counts_K = torch.unique_consecutive(images.labels, return_counts=True)[1]
    num_probes = int(counts_K[counts_K > 1].sum())
    if num_probes == 0:
        raise UserError(f"no two of the {len(labels_N)} evaluated images are of the same class")
    hits = torch.zeros(len(ranks), dtype=torch.int64, device=features_ND.device)
    for rows in share(blocks(len(images), block), part):
        rivals_B = _count_rivals(images[rows], images, block)
        hits += torch.stack([((rivals_B >= 0) & (rivals_B < rank)).sum() for rank in ranks])
    accuracies = (total(hits).double() / num_probes).tolist()
    return {
        "num_probes": num_probes,
        **{f"rank{k}": value for k, value in zip(ranks, accuracies, strict=True)},
    }


def intra_inter_cosine(features_ND: Tensor, labels_N: Tensor) -> tuple[float | None, float | None]:
    """Return the mean cosine over all pairs of the same class, and over all pairs of different classes.

    None for a kind that has no pair.
    Exact in O(N D): the cosines of all ordered pairs of a set, self-pairs included, add up to the squared
    length of the sum of its features. Self-pairs are taken off. Sums are float64. There is no work worth
    sharing.
    """
    images = by_class(features_ND, labels_N)
    _, class_N, counts_K = torch.unique_consecutive(images.labels, return_inverse=True, return_counts=True)
    num_genuine = int((counts_K * (counts_K - 1)).sum()) // 2
    num_impostor = len(images) * (len(images) - 1) // 2 - num_genuine
    features_ND = images.features.double()
    sums_KD = features_ND.new_zeros(len(counts_K), features_ND.shape[1]).index_add_(0, class_N, features_ND)
    all_pairs, same_class = sums_KD.sum(0).square().sum(), sums_KD.square().sum()
    self_pairs = features_ND.square().sum()
    return (
        float((same_class - self_pairs) / (2 * num_genuine)) if num_genuine else None,
        float((all_pairs - same_class) / (2 * num_impostor)) if num_impostor else None,
    )


def verification(
    features_ND: Tensor,
    labels_N: Tensor,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    part: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = alone,
    gather: Callable[[Tensor], Tensor] = alone,
    block: int = BLOCK,
) -> Verification:
    """Compare all N (N - 1) / 2 pairs of images, exactly.

    TAR changes only at genuine scores: they, and the number of impostors that reach each, are the whole
    curve. Pass 1 collects the genuine scores, which stay in memory (4 bytes for each of the sum of n (n -
    1) / 2 pairs over classes of n images); pass 2 counts impostors against them and forgets each tile.
    """
    images = by_class(features_ND, labels_N)
    num_genuine, num_impostor = count_pairs(images.labels)
    pieces = [images[rows] for rows in blocks(len(images), block)]
    tiles = list(itertools.combinations_with_replacement(pieces, 2))  # the upper triangle

    scores = gather(_genuine_scores(share([tile for tile in tiles if overlap(*tile)], part), images))
    if len(scores) != num_genuine:
        raise ValueError(f"gather returned {len(scores)} of {num_genuine} genuine scores (part is {part})")
    thresholds_T, genuine_T = np.unique(scores.cpu().numpy(), return_counts=True)
    counts_2T = torch.from_numpy(_count_impostors(share(tiles, part), thresholds_T))
    above_T, reaching_T = total(counts_2T.to(features_ND.device)).cpu().numpy()

    edges_T = np.nextafter(thresholds_T, np.float32(np.inf))
    return curve_of_counts(thresholds_T, edges_T, genuine_T, above_T, reaching_T, num_impostor, fars)


def _genuine_scores(tiles: Iterable[Tile], images: Images) -> Tensor:
    scores = [images.features.new_empty(0, dtype=torch.float32)]
    for rows, columns in tiles:
        wanted_BG = (rows.labels[:, None] == columns.labels) & (rows.ids[:, None] < columns.ids)
        scores.append(cosines(rows, columns).masked_select(wanted_BG))
    return torch.cat(scores)


def _count_impostors(tiles: Iterable[Tile], thresholds_T: np.ndarray) -> np.ndarray:
    """Count impostor pairs that score above each threshold (first row), and that reach it (second row)."""
    counts_2T = np.zeros((2, len(thresholds_T)), dtype=np.int64)
    for rows, columns in tiles:
        wanted_BG = (rows.labels[:, None] != columns.labels) & (rows.ids[:, None] < columns.ids)
        scores = cosines(rows, columns).masked_select(wanted_BG).cpu().numpy()
        scores.sort()  # numpy's vectorised sort: three times as fast as torch's, and no array of indices
        counts_2T[0] += len(scores) - np.searchsorted(scores, thresholds_T, side="right")
        counts_2T[1] += len(scores) - np.searchsorted(scores, thresholds_T, side="left")
    return counts_2T


def _count_rivals(probes: Images, gallery: Images, block: int) -> Tensor:
    """Count for each probe the gallery's other-class entries at least as near as the nearest of its class.

    -1 where the gallery has no entry of its class (but for itself).
    """
    pieces = [gallery[columns] for columns in blocks(len(gallery), block)]
    best_B = torch.full((len(probes),), -torch.inf, device=probes.features.device)
    for columns in pieces:
        if overlap(probes, columns):
            mate_BG = (probes.labels[:, None] == columns.labels) & (probes.ids[:, None] != columns.ids)
            cosines_BG = cosines(probes, columns).masked_fill(~mate_BG, -torch.inf)
            best_B = torch.maximum(best_B, cosines_BG.amax(dim=1))
    rivals_B = torch.zeros_like(probes.labels)
    for columns in pieces:
        other_BG = probes.labels[:, None] != columns.labels
        rivals_B += ((cosines(probes, columns) >= best_B[:, None]) & other_BG).sum(dim=1)
    return rivals_B.masked_fill(best_B == -torch.inf, -1)
