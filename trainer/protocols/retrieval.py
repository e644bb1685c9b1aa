"""Retrieval: every image is a query against all others, or against a gallery.

R is the number of the query's class in the gallery (but for itself); queries with R = 0 do not count.

    recall@k       1 if one of the k nearest is of the query's class
    r_precision    hits among the R nearest / R
    map@r          1/R sum_{i=1..R} [i-th is a hit] (hits among the i nearest) / i     (Musgrave et al., 2020)

Dimensions: P queries, G gallery, k nearest, V queries that count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.protocols.ranking import hits_of, nearest
from trainer.tiles import ALONE, BLOCK, Images, Sharing


def retrieval(
    queries: Images,
    gallery: Images,
    ks: Sequence[int] = (1, 2, 4, 8),
    sharing: Sharing = ALONE,
    block: int = BLOCK,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return name -> value of each query that counts, float64, and which do (P bools).

    The figure is the mean. Pass the same images twice for leave-one-out. Every rank must call it.
    """
    relevant_P = count_relevant(queries, gallery)
    counts_P = relevant_P > 0
    if not counts_P.any():
        raise UserError("no image of the gallery is of the class of a query")
    deepest = int(max(max(ks), int(relevant_P.max())))
    hits_Vk = hits_of(nearest(queries, gallery, deepest, sharing, block)[counts_P])
    relevant_V = relevant_P[counts_P]
    place_k = torch.arange(1, deepest + 1, device=hits_Vk.device)
    within_Vk = hits_Vk & (place_k <= relevant_V[:, None])
    precision_Vk = hits_Vk.cumsum(dim=1).double() / place_k
    values = {f"recall@{k}": hits_Vk[:, :k].any(dim=1).double() for k in ks}
    values["r_precision"] = within_Vk.sum(dim=1).double() / relevant_V
    values["map@r"] = (precision_Vk * within_Vk).sum(dim=1) / relevant_V
    return values, counts_P


def count_relevant(queries: Images, gallery: Images) -> Tensor:
    """Count for each query the gallery's images of its label, without itself."""
    ordered_G = gallery.labels.sort().values
    upto = torch.searchsorted(ordered_G, queries.labels, right=True)
    own_P = torch.isin(queries.ids, gallery.ids).long()
    return upto - torch.searchsorted(ordered_G, queries.labels) - own_P
