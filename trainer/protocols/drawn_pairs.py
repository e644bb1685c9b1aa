"""Intervals of AUC, EER and accuracy over all pairs of a set, by drawing its identities again.

Drawn c_a and c_b times, identities a and b make c_a c_b times their impostor pairs, and a makes c_a times its
genuine ones. So what a draw needs is, of every two identities, how many pairs have which score: with more
than GROUPS identities, of every two groups of them, which are then drawn as one. Scores fall into coarse bins
whose edges lie evenly along the ROC curve of the whole set. Memory is GROUPS^2 bins, whatever the set.

That groups are drawn instead makes the interval's width vary by 1 / sqrt(2 GROUPS) = 7 %, not its mean.

Dimensions: N images, D feature, G groups, T coarse bins, F fine ones (of ``open_set``), R draws, V vertices.
"""

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.protocols.bootstrap import draws, percentiles
from trainer.protocols.open_set import BINS_OF_ONE, BLOCK, NUM_BINS, count_bins, fine_bins
from trainer.roc import Verification, equal_error_rate
from trainer.tiles import ALONE, Images, Sharing, blocks, share

GROUPS = 100
MAX_BINS = 1024


def drawn_intervals(
    features_ND: Tensor,
    labels_N: Tensor,
    curve: Verification,
    resamples: int,
    sharing: Sharing = ALONE,
    groups: int = GROUPS,
) -> dict[str, tuple[float, float]]:
    """Return the intervals of ``auc``, ``best_accuracy`` and ``eer`` of a set whose ROC is ``curve``.

    Every rank must call it and gets the same.
    """
    _, identity_N = labels_N.unique(return_inverse=True)
    group_N = identity_N % groups
    coarse_F = torch.from_numpy(_coarse_bins(curve)).to(features_ND.device)
    genuine_GT, impostor_GGT = _count(features_ND, identity_N, group_N, coarse_F, sharing)
    counts_RG = np.stack(list(draws(len(genuine_GT), resamples))).astype(np.float64)
    tar_RV = _curves(counts_RG @ genuine_GT)
    far_RV = _curves(sum(counts_RG[:, [g]] * (counts_RG @ impostor_GGT[g]) for g in range(len(genuine_GT))))
    eers = [equal_error_rate(far_V, tar_V) for far_V, tar_V in zip(far_RV, tar_RV, strict=True)]
    values = {
        "auc": np.trapezoid(tar_RV, far_RV, axis=1),
        "best_accuracy": ((tar_RV + 1 - far_RV) / 2).max(axis=1),
        "eer": np.array(eers),
    }
    return {name: percentiles(values_R) for name, values_R in values.items()}


def _coarse_bins(curve: Verification) -> NDArray[np.int64]:
    """Return the coarse bin of every fine one: edges at each genuine score, or evenly along the curve."""
    inner = np.isfinite(curve.thresholds)
    scores_V, along_V = curve.thresholds[inner], (curve.far + curve.tar)[inner]
    scored = np.unique(np.floor(scores_V.astype(np.float64) * BINS_OF_ONE)).astype(np.int64)
    if len(scored) > MAX_BINS // 2:
        chosen = np.searchsorted(along_V, np.linspace(0, 2, MAX_BINS // 2)).clip(max=len(scores_V) - 1)
        scored = np.unique(np.floor(scores_V[chosen].astype(np.float64) * BINS_OF_ONE)).astype(np.int64)
    edges = np.unique(np.concatenate([scored, scored + 1])) + NUM_BINS // 2
    return np.searchsorted(edges, np.arange(NUM_BINS), side="right")


def _count(
    features_ND: Tensor, identity_N: Tensor, group_N: Tensor, coarse_F: Tensor, sharing: Sharing
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count genuine pairs of each group and impostor pairs of every two (g <= h), by score."""
    num_groups, num_bins = int(group_N.max()) + 1, int(coarse_F.max()) + 1
    order_N = group_N.argsort(stable=True)
    images = Images(
        features_ND[order_N], identity_N[order_N], torch.arange(len(order_N), device=order_N.device)
    )
    ends_G = torch.bincount(group_N).cumsum(0).tolist()
    spans = [slice(start, end) for start, end in itertools.pairwise([0, *ends_G])]
    device = features_ND.device
    genuine_GT = torch.zeros(num_groups, num_bins, dtype=torch.float64, device=device)
    impostor_GGT = torch.zeros(num_groups, num_groups, num_bins, dtype=torch.float64, device=device)

    def add_(counts_T: Tensor, bins: Tensor) -> None:
        counts_T.index_add_(0, coarse_F, count_bins(bins).double())

    for g, h in share(itertools.combinations_with_replacement(range(num_groups), 2), sharing.part):
        rows_of, columns_of = images[spans[g]], images[spans[h]]
        for rows, columns in itertools.product(blocks(len(rows_of), BLOCK), blocks(len(columns_of), BLOCK)):
            left, right = rows_of[rows], columns_of[columns]
            bins_BC, other_BC = fine_bins(left, right), left.labels[:, None] != right.labels
            if g < h:
                add_(impostor_GGT[g, h], bins_BC.view(-1))  # groups have no identity in common
            else:
                once_BC = left.ids[:, None] < right.ids
                add_(genuine_GT[g], bins_BC.masked_select(once_BC & ~other_BC))
                add_(impostor_GGT[g, g], bins_BC.masked_select(once_BC & other_BC))
    return sharing.total(genuine_GT).cpu().numpy(), sharing.total(impostor_GGT).cpu().numpy()


def _curves(counts_RT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rates from 0 to 1 at falling thresholds; NaN for a draw without a pair of the kind."""
    reaching_RT = counts_RT[:, ::-1].cumsum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.pad(reaching_RT / reaching_RT[:, -1:], ((0, 0), (1, 0)))
