"""How good features are: closed-set accuracy, verification and identification, exact and in bounded memory.

Every function takes unit features, one row per image, and integer labels: all of them, in the same order, on
every rank. (A row of zeros is let pass: it has no direction, its cosine with anything is 0.) Nothing of size
N x N exists: cosines are made tile by tile, ``block x block`` at a time.

Ranks share the work through plain arguments, so this file knows no process group:

    part    (rank, world): this caller does every world-th piece of the work, starting with piece ``rank``.
    total   sums a tensor of counts (int64, on the features' device) over all callers: an all-reduce.
    gather  concatenates 1-D float32 tensors of different lengths over all callers, in any order.

With ``world > 1`` all ranks must make the same call, and every rank gets the same result, equal for every
world size and every ``block``: only integer counts and sets of scores are exchanged, and a score does not
depend on who computes it. Cosines are accumulated in float64, where products of float32 are exact, and
rounded once to float32, which hides the order of summation that a BLAS chooses by tile shape and threads.

A tie counts against the model (in ``auc``, half): one that gives every image the same feature recognises
nobody, not everybody.

Dimensions: N images, D feature, K classes, B images of a block, G of a block of the gallery, T distinct
genuine scores, V vertices of the ROC curve.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.errors import UserError

BLOCK = 2048  # 4M cosines: 32 MB in float64, 16 MB in float32, the rest masks and the selected scores
CURVE_POINTS = 2000


def alone(values: Tensor) -> Tensor:
    """Be ``total`` and ``gather`` of a world of one."""
    return values


@dataclass(frozen=True)
class Sharing:
    """How ranks share work: ``part``, ``total`` and ``gather`` of the module's docstring in one argument."""

    part: tuple[int, int] = (0, 1)
    total: Callable[[Tensor], Tensor] = alone
    gather: Callable[[Tensor], Tensor] = alone


ALONE = Sharing()


@dataclass(frozen=True)
class Verification:
    """One-to-one matching: two images are taken for the same class if their cosine >= a threshold.

    TAR (true accept rate) is the fraction accepted of genuine pairs, FAR (false accept rate) of impostors.

    ``best_accuracy`` is balanced: the maximum over thresholds of (TAR + 1 - FAR) / 2, the accuracy on
    equally many genuine and impostor pairs, as LFW and its kin are made. Among all pairs impostors abound,
    so that plain accuracy would be above 99 % for refusing everyone. The threshold is chosen on these very
    pairs (no folds).

    ``eer`` is where FAR = 1 - TAR on the ROC curve, with straight lines between its vertices as for ``auc``:
    the probability that a genuine pair scores higher than an impostor pair, ties counted half.

    ``tar_at_far[x]`` is the highest TAR of any threshold with FAR <= x, not interpolated. An x that the
    impostors cannot support, x * num_impostor < 10, is left out: fewer than ten errors are an anecdote.

    ``far``, ``tar``, ``thresholds`` are vertices of the curve from (0, 0) to (1, 1), thinned for drawing to
    at most 2000; all figures above are of the full curve.
    """

    auc: float
    best_accuracy: float
    eer: float
    tar_at_far: dict[float, float]
    num_genuine: int
    num_impostor: int
    far: np.ndarray = field(repr=False, compare=False)
    tar: np.ndarray = field(repr=False, compare=False)
    thresholds: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Images:
    """Features, labels and ids, which tell an image from itself; often sorted by label."""

    features: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Images":
        return Images(self.features[rows], self.labels[rows], self.ids[rows])


Work = TypeVar("Work")
Tile = tuple[Images, Images]


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


def intra_inter_cosine(features_ND: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Return the mean cosine over all pairs of the same class, and over all pairs of different classes.

    Exact in O(N D): the cosines of all ordered pairs of a set, self-pairs included, add up to the squared
    length of the sum of its features. Self-pairs are taken off. Sums are float64. There is no work worth
    sharing.
    """
    images = by_class(features_ND, labels_N)
    _, class_N, counts_K = torch.unique_consecutive(images.labels, return_inverse=True, return_counts=True)
    num_genuine, num_impostor = count_pairs(images.labels)
    features_ND = images.features.double()
    sums_KD = features_ND.new_zeros(len(counts_K), features_ND.shape[1]).index_add_(0, class_N, features_ND)
    all_pairs, same_class = sums_KD.sum(0).square().sum(), sums_KD.square().sum()
    self_pairs = features_ND.square().sum()
    return (
        float((same_class - self_pairs) / (2 * num_genuine)),
        float((all_pairs - same_class) / (2 * num_impostor)),
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


def curve_of_counts(
    thresholds_T: np.ndarray,
    edges_T: np.ndarray,
    genuine_T: np.ndarray,
    above_T: np.ndarray,
    reaching_T: np.ndarray,
    num_impostor: int,
    fars: Sequence[float],
) -> Verification:
    """Return all figures of a curve: T rising thresholds and, above each, the next value a score can have.

    ``genuine_T`` genuine pairs score from threshold to edge; ``reaching_T`` impostors reach the threshold,
    ``above_T`` the edge. Thresholds without genuine pairs may be left out.
    """
    num_genuine = int(genuine_T.sum())
    genuine_reaching_T = genuine_T[::-1].cumsum()[::-1]
    far_V = _vertices(0, above_T, reaching_T, num_impostor) / num_impostor
    tar_V = _vertices(0, genuine_reaching_T - genuine_T, genuine_reaching_T, num_genuine) / num_genuine
    thresholds_V = _vertices(np.inf, edges_T, thresholds_T, -np.inf)
    kept = _thin(far_V, tar_V)
    return Verification(
        auc=float(np.trapezoid(tar_V, far_V)),
        best_accuracy=float(((tar_V + 1 - far_V) / 2).max()),
        eer=equal_error_rate(far_V, tar_V),
        tar_at_far={far: _tar_at(far, far_V, tar_V) for far in fars if far * num_impostor >= 10},
        num_genuine=num_genuine,
        num_impostor=num_impostor,
        far=far_V[kept],
        tar=tar_V[kept],
        thresholds=thresholds_V[kept],
    )


def by_class(features_ND: Tensor, labels_N: Tensor) -> Images:
    """Check the input and sort it by label."""
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
        raise ValueError(
            f"features {[*features_ND.shape]} and labels {[*labels_N.shape]} are not N x D and N"
        )
    if len(labels_N) == 0:
        raise UserError("there are no images to evaluate")
    lengths_N = torch.linalg.vector_norm(features_ND, dim=1, dtype=torch.float32)
    wrong_N = ~(((lengths_N - 1).abs() < 1e-3) | (lengths_N == 0))  # NaN is wrong too
    if wrong_N.any():
        row = int(wrong_N.int().argmax())
        cause = "were they normalised?" if lengths_N[row].isfinite() else "the model has diverged"
        raise UserError(f"feature of image {row} has length {float(lengths_N[row]):g} instead of 1: {cause}")
    labels_N, order_N = labels_N.to(features_ND.device).sort(stable=True)
    return Images(features_ND[order_N], labels_N, torch.arange(len(labels_N), device=features_ND.device))


def count_pairs(labels_N: Tensor) -> tuple[int, int]:
    """Count genuine and impostor pairs of sorted labels; refuse to go on without either."""
    counts = torch.unique_consecutive(labels_N, return_counts=True)[1].tolist()
    num_pairs = len(labels_N) * (len(labels_N) - 1) // 2
    num_genuine = sum(n * (n - 1) // 2 for n in counts)
    if not 0 < num_genuine < num_pairs:
        kind = "a different" if num_genuine else "the same"
        raise UserError(f"no two of the {len(labels_N)} evaluated images are of {kind} class")
    return num_genuine, num_pairs - num_genuine


def blocks(length: int, block: int) -> Iterator[slice]:
    """Cut 0..length into slices of ``block``; the last may be shorter."""
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def share(work: Iterable[Work], part: tuple[int, int]) -> Iterator[Work]:
    """Deal the work out like cards, so that ranks get equally many pieces of each size."""
    rank, world = part
    if not 0 <= rank < world:
        raise ValueError(f"part {part} is not (rank, world)")
    return itertools.islice(work, rank, None, world)


def cosines(rows: Images, columns: Images) -> Tensor:
    """Return B x G cosines, correctly rounded to float32 whatever the tile (see the module's docstring)."""
    return (rows.features.double() @ columns.features.double().T).float()


def overlap(rows: Images, columns: Images) -> bool:
    """Say whether the tile may hold pairs of the same class."""
    return bool(rows.labels[0] <= columns.labels[-1]) and bool(columns.labels[0] <= rows.labels[-1])


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


def _vertices(first: float, above_T: np.ndarray, reaching_T: np.ndarray, last: float) -> np.ndarray:
    """Line up the ROC's vertices: for each threshold, from the highest, what is above it, what reaches it."""
    return np.concatenate([[first], np.stack([above_T, reaching_T], axis=1)[::-1].ravel(), [last]])


def _tar_at(limit: float, far_V: np.ndarray, tar_V: np.ndarray) -> float:
    return float(tar_V[np.searchsorted(far_V, limit, side="right") - 1])


def equal_error_rate(far_V: np.ndarray, tar_V: np.ndarray) -> float:
    """Return the FAR where FAR + TAR - 1, which rises from -1 to 1 along a ROC curve, passes 0."""
    excess_V = far_V + tar_V - 1
    after = int(np.searchsorted(excess_V, 0))
    before = after - 1
    weight = -excess_V[before] / (excess_V[after] - excess_V[before])
    return float(far_V[before] + weight * (far_V[after] - far_V[before]))


def _thin(far_V: np.ndarray, tar_V: np.ndarray) -> np.ndarray:
    """Choose at most CURVE_POINTS vertices, evenly along the curve and along log FAR, with both ends."""
    if len(far_V) <= CURVE_POINTS:
        return np.arange(len(far_V))
    half = CURVE_POINTS // 2 - 1
    along = np.searchsorted(far_V + tar_V, np.linspace(0, 2, half))
    log_along = np.searchsorted(far_V, np.geomspace(far_V[far_V > 0][0], 1, half))
    return np.unique(np.concatenate([[0], along, log_along, [len(far_V) - 1]]).clip(0, len(far_V) - 1))
