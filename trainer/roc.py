"""The ROC curve of one-to-one matching, from counts of pairs by score, and every figure read off it.

Dimensions: T rising thresholds, V vertices of the curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

CURVE_POINTS = 2000


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


def equal_error_rate(far_V: np.ndarray, tar_V: np.ndarray) -> float:
    """Return the FAR where FAR + TAR - 1, which rises from -1 to 1 along a ROC curve, passes 0."""
    excess_V = far_V + tar_V - 1
    after = int(np.searchsorted(excess_V, 0))
    before = after - 1
    weight = -excess_V[before] / (excess_V[after] - excess_V[before])
    return float(far_V[before] + weight * (far_V[after] - far_V[before]))


def _vertices(first: float, above_T: np.ndarray, reaching_T: np.ndarray, last: float) -> np.ndarray:
    """Line up the ROC's vertices: for each threshold, from the highest, what is above it, what reaches it."""
    return np.concatenate([[first], np.stack([above_T, reaching_T], axis=1)[::-1].ravel(), [last]])


def _tar_at(limit: float, far_V: np.ndarray, tar_V: np.ndarray) -> float:
    return float(tar_V[np.searchsorted(far_V, limit, side="right") - 1])


def _thin(far_V: np.ndarray, tar_V: np.ndarray) -> np.ndarray:
    """Choose at most CURVE_POINTS vertices, evenly along the curve and along log FAR, with both ends."""
    if len(far_V) <= CURVE_POINTS:
        return np.arange(len(far_V))
    half = CURVE_POINTS // 2 - 1
    along = np.searchsorted(far_V + tar_V, np.linspace(0, 2, half))
    log_along = np.searchsorted(far_V, np.geomspace(far_V[far_V > 0][0], 1, half))
    return np.unique(np.concatenate([[0], along, log_along, [len(far_V) - 1]]).clip(0, len(far_V) - 1))
