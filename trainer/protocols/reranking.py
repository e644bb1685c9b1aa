"""k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017), without a matrix of all pairs.

Two images are k-reciprocal neighbours if each is among the other's k nearest. From such sets every image
gets a sparse vector V of weights exp(-d) over few others, averaged over its k2 nearest; images are compared
by the Jaccard distance of these vectors, mixed with the distance d itself:

    d* = (1 - lambda) d_Jaccard + lambda d,      d_Jaccard(q, g) = 1 - sum_i min(V_qi, V_gi) / (2 - sum_i min)

d is the squared Euclidean distance, divided by the largest of the query's row over queries and gallery. What
the published code holds as dense N x N matrices is sparse here: k1 and a few dozen neighbours of each image.

Dimensions: A all images (queries, then gallery), Q queries, G gallery, D feature, k neighbours.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from trainer.tiles import ALONE, Sharing, blocks, share


def reranked(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    sharing: Sharing = ALONE,
    block: int = 512,
) -> Callable[[slice], Tensor]:
    """Return what gives, for a slice of the queries, B x G similarities -d* (for ``reid``).

    Every rank must call it; they share the search for neighbours, which is where the time goes.
    """
    all_AD = torch.cat([queries_QD, gallery_GD])
    k1 = min(k1, len(all_AD) - 1)
    nearest_Ak, largest_A = _neighbours(all_AD, max(k1, k2 - 1) + 1, sharing, block)
    vectors = _expanded(_encode(all_AD, nearest_Ak, largest_A, k1), nearest_Ak, k2)
    by_column = vectors[len(queries_QD) :].tocsc()

    def similarities(rows: slice) -> Tensor:
        distances_BG = _distances(queries_QD[rows], gallery_GD) / largest_A[: len(queries_QD)][rows, None]
        overlap_BG = np.stack([_overlap(vectors[i], by_column) for i in range(len(queries_QD))[rows]])
        jaccard_BG = torch.from_numpy(1 - overlap_BG / (2 - overlap_BG)).to(distances_BG.device)
        return -((1 - weight) * jaccard_BG + weight * distances_BG).float()

    return similarities


def _distances(rows_BD: Tensor, columns_GD: Tensor) -> Tensor:
    """Return squared Euclidean distances of unit features, float64."""
    return (2 - 2 * rows_BD.double() @ columns_GD.double().T).clamp_(min=0)


def _neighbours(all_AD: Tensor, k: int, sharing: Sharing, block: int) -> tuple[NDArray, Tensor]:
    """Return the A x k nearest of every image, itself first, and its largest distance to any."""
    nearest_Ak = torch.zeros(len(all_AD), k, dtype=torch.int64, device=all_AD.device)
    largest_A = torch.zeros(len(all_AD), dtype=torch.float64, device=all_AD.device)
    for rows in share(blocks(len(all_AD), block), sharing.part):
        distances_BA = _distances(all_AD[rows], all_AD)
        largest_A[rows] = distances_BA.amax(dim=1)
        own = torch.arange(len(all_AD), device=all_AD.device)[rows]
        distances_BA.scatter_(1, own[:, None], -1)  # an equal image must not take its place
        nearest_Ak[rows] = distances_BA.topk(k, dim=1, largest=False).indices
    return sharing.total(nearest_Ak).cpu().numpy(), sharing.total(largest_A)


def _reciprocal(nearest_Ak: NDArray, image: int, k: int) -> NDArray:
    """Return the k-reciprocal neighbours of an image, itself included."""
    forward = nearest_Ak[image, : k + 1]
    return forward[(nearest_Ak[forward, : k + 1] == image).any(axis=1)]


def _encode(all_AD: Tensor, nearest_Ak: NDArray, largest_A: Tensor, k1: int) -> sparse.csr_matrix:
    """Return the A x A sparse weights: exp(-d) over the k1-reciprocal set and the halves that overlap it."""
    half = round(k1 / 2)
    weights, columns, starts = [], [], [0]
    halves = [_reciprocal(nearest_Ak, i, half) for i in range(len(all_AD))]
    for i in range(len(all_AD)):
        core = _reciprocal(nearest_Ak, i, k1)
        near = [halves[j] for j in core]
        grown = [h for h in near if len(np.intersect1d(h, core)) > 2 / 3 * len(h)]
        chosen = np.unique(np.concatenate([core, *grown]))
        distances = _distances(all_AD[i : i + 1], all_AD[chosen])[0] / largest_A[i]
        weight = torch.exp(-distances).cpu().numpy()
        weights.append(weight / weight.sum())
        columns.append(chosen)
        starts.append(starts[-1] + len(chosen))
    shape = (len(all_AD), len(all_AD))
    return sparse.csr_matrix((np.concatenate(weights), np.concatenate(columns), starts), shape)


def _expanded(vectors: sparse.csr_matrix, nearest_Ak: NDArray, k2: int) -> sparse.csr_matrix:
    """Average every vector over the image's k2 nearest (local query expansion)."""
    if k2 == 1:
        return vectors
    num_images, k2 = len(nearest_Ak), min(k2, nearest_Ak.shape[1])
    columns = nearest_Ak[:, :k2].ravel()
    starts = np.arange(num_images + 1) * k2
    average = sparse.csr_matrix((np.full(len(columns), 1 / k2), columns, starts), vectors.shape)
    return (average @ vectors).tocsr()


def _overlap(vector: sparse.csr_matrix, by_column: sparse.csc_matrix) -> NDArray[np.float64]:
    """Return sum_i min(V_qi, V_gi) for one query and every gallery image."""
    total_G = np.zeros(by_column.shape[0])
    for column, value in zip(vector.indices, vector.data, strict=True):
        span = slice(by_column.indptr[column], by_column.indptr[column + 1])
        total_G[by_column.indices[span]] += np.minimum(value, by_column.data[span])
    return total_G
