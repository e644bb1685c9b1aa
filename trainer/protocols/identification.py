"""1:N identification of probes in a gallery, closed and open set (as IJB's 1:N).

    rank@k         is one of the k nearest of the gallery the same person? over probes whose person is there
    tpir@fpir=x    open set, see ``ranking.tpir_at_fpir``; the other probes are the non-mated searches

A subject of several images becomes one feature by ``pooled`` first.

Dimensions: N images, M media, T templates, D feature, P probes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UserError
from trainer.protocols.ranking import cosines_of, hits_of, nearest, tpir_at_fpir
from trainer.protocols.retrieval import count_relevant
from trainer.tiles import ALONE, BLOCK, Images, Sharing


def identification(
    probes: Images,
    gallery: Images,
    ks: Sequence[int] = (1, 5, 10),
    fpirs: tuple[float, ...] = (0.1, 0.01, 0.001),
    sharing: Sharing = ALONE,
    block: int = BLOCK,
) -> tuple[dict[str, Tensor], Tensor, dict[float, Tensor]]:
    """Return rank@k -> hit of each mated probe (float64), which probes are mated, and fpir -> hits, open set.

    The figures are the means. Every rank must call it and gets the same.
    """
    mated_P = count_relevant(probes, gallery) > 0
    if not mated_P.any():
        raise UserError("no probe's person is in the gallery")
    keys_Pk = nearest(probes, gallery, max(ks), sharing, block)
    hits_Pk, best_P = hits_of(keys_Pk), cosines_of(keys_Pk[:, 0])
    values = {f"rank{k}": hits_Pk[mated_P, :k].any(dim=1).double() for k in ks}
    rates = tpir_at_fpir(best_P[mated_P], hits_Pk[mated_P, 0], best_P[~mated_P], fpirs)
    return values, mated_P, rates


def pooled(features_ND: Tensor, template_N: Tensor, media_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return T unit features and the T template numbers, rising: the mean of a template's media.

    The frames of one medium (a video) are averaged first and count as one image, as IJB has it. Sums are
    float64, so the order of images does not matter.
    """
    features = features_ND.double()
    if media_N is not None:
        # A medium belongs to a template: the same video in two templates is two media.
        pairs_M2, medium_N = torch.unique(torch.stack([template_N, media_N], 1), dim=0, return_inverse=True)
        features, template_N = _means(features, medium_N, len(pairs_M2)), pairs_M2[:, 0]
    names_T, group_N = torch.unique(template_N, return_inverse=True)
    return F.normalize(_means(features, group_N, len(names_T))).float(), names_T


def _means(rows_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    sums = rows_ND.new_zeros(num_groups, rows_ND.shape[1]).index_add_(0, group_N, rows_ND)
    return sums / torch.bincount(group_N, minlength=num_groups)[:, None]
