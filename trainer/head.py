"""The class-parallel head: exact softmax over all K classes, whose rows are cut over the ranks.

The COCO loss (arXiv 1710.00870, eq. of section 3.2; docs/coco.md) of a batch with labels y is

    L = - 1/B sum_i log( exp(z_i,y_i) / sum_k exp(z_ik) ),     z_ik = alpha <f_i, c_k>,  |f_i| = |c_k| = 1.

Rank r holds rows ``start..stop`` of the K x D centroids and nothing else of them:

    1. all-gather the features and labels of the batch           N x D  -> B x D on every rank
    2. logits of the rank's own classes                          B x C
    3. all-reduce MAX of (target logit, highest other logit)     2B floats
    4. all-reduce SUM of exp(z - max)                            B floats: loss and softmax are now exact
    5. backward needs no collective for the rows; the features' gradient is reduce-scattered by (1)

Legend: N images of this rank, B of all ranks, C classes of this rank, K of all, D width of the embedding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import gather_batch, max_over, sum_over

_ROWS_PER_KEY = 4096


@dataclass(frozen=True)
class ClassShard:
    """The classes of one rank: rows ``start`` (inclusive) to ``stop`` (exclusive) of ``num_classes``."""

    start: int
    stop: int
    num_classes: int

    @classmethod
    def of_rank(cls, num_classes: int, rank: int, num_ranks: int) -> "ClassShard":
        """Cut K classes as evenly as possible: sizes differ by at most one, none is empty.

        Raises ValueError when there are more ranks than classes.
        """
        if num_classes < num_ranks:
            raise ValueError(f"{num_classes} classes cannot be cut over {num_ranks} ranks")
        return cls(num_classes * rank // num_ranks, num_classes * (rank + 1) // num_ranks, num_classes)

    def __len__(self) -> int:
        return self.stop - self.start


class HeadOutput(NamedTuple):
    """What a head makes of a batch; the same on every rank."""

    loss: Tensor
    """Mean over the global batch, with gradient."""

    metrics: dict[str, Tensor]
    """By-products without gradient: name -> scalar, means over the batch."""


class CocoHead(nn.Module):
    """Scaled cosine softmax over learned unit centroids; no bias, no margin."""

    def __init__(self, shard: ClassShard, dim: int, *, scale: float, seed: int, group: ProcessGroup) -> None:
        super().__init__()
        self.shard, self.scale, self.group = shard, scale, group
        self.centroids_CD = nn.Parameter(initial_rows(seed, shard, dim))

    def forward(self, embeddings_ND: Tensor, labels_N: Tensor) -> HeadOutput:
        """Return loss and metrics of the global batch. Every rank must call it, with equal N."""
        features_BD = gather_batch(F.normalize(embeddings_ND.float()), self.group)
        return self.of_features(features_BD, gather_batch(labels_N, self.group))

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for a batch that every rank holds whole."""
        return self.of_features(F.normalize(embeddings_BD.float()), labels_B)

    def of_features(self, features_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for unit features. Every rank must call it with the same batch."""
        z_BC = self.scale * (features_BD @ F.normalize(self.centroids_CD).T)
        loss_B, target_B, other_B = _ShardedCrossEntropy.apply(z_BC, labels_B, self.shard, self.group)
        metrics = {
            "accuracy": (target_B > other_B).float().mean(),
            "cosine_target": target_B.mean() / self.scale,
            "cosine_nearest_other": other_B.mean() / self.scale,
        }
        return HeadOutput(loss_B.mean(), metrics)

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.centroids_CD.detach())


class SoftmaxHead(nn.Module):
    """Plain softmax over inner products and a bias, cut the same way: the baseline."""

    def __init__(self, shard: ClassShard, dim: int, *, seed: int, group: ProcessGroup) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        self.weight_CD = nn.Parameter(initial_rows(seed, shard, dim))
        self.bias_C = nn.Parameter(torch.zeros(len(shard)))

    def forward(self, embeddings_ND: Tensor, labels_N: Tensor) -> HeadOutput:
        """Return loss and metrics of the global batch. Every rank must call it, with equal N."""
        embeddings_BD = gather_batch(embeddings_ND.float(), self.group)
        return self.of_embeddings(embeddings_BD, gather_batch(labels_N, self.group))

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for a batch that every rank holds whole. Every rank must call it."""
        z_BC = embeddings_BD @ self.weight_CD.T + self.bias_C
        loss_B, target_B, other_B = _ShardedCrossEntropy.apply(z_BC, labels_B, self.shard, self.group)
        return HeadOutput(loss_B.mean(), {"accuracy": (target_B > other_B).float().mean()})

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.weight_CD.detach())


def target_and_other(z_BC: Tensor, labels_B: Tensor, shard: ClassShard, group: ProcessGroup) -> Tensor:
    """Return 2 x B: every target's score, and the highest score of any other class on any rank.

    Every rank must call it with the scores of its own classes; each gets the same. One all-reduce MAX.
    """
    rows, columns = _own_targets(labels_B, shard)
    lowest = z_BC.new_tensor(torch.finfo(z_BC.dtype).min)
    target_B = lowest.repeat(z_BC.shape[0])
    target_B[rows] = z_BC[rows, columns]
    other_B = z_BC.index_put((rows, columns), lowest).amax(dim=1)
    return max_over(torch.stack([target_B, other_B]), group)


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits whose columns are cut over ranks: two all-reduces, and none in backward."""

    @staticmethod
    def forward(
        ctx: Any, z_BC: Tensor, labels_B: Tensor, shard: ClassShard, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        target_B, other_B = target_and_other(z_BC, labels_B, shard, group)
        shift_B = torch.maximum(other_B, target_B)
        p_BC = torch.exp(z_BC - shift_B[:, None])
        sum_B = sum_over(p_BC.sum(dim=1), group)
        p_BC /= sum_B[:, None]
        ctx.shard = shard
        ctx.save_for_backward(p_BC, labels_B)
        ctx.mark_non_differentiable(target_B, other_B)
        return sum_B.log() + shift_B - target_B, target_B, other_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        p_BC, labels_B = ctx.saved_tensors
        rows, columns = _own_targets(labels_B, ctx.shard)
        grad_BC = p_BC * grad_B[:, None]
        grad_BC[rows, columns] -= grad_B[rows]
        return grad_BC, None, None, None


def _own_targets(labels_B: Tensor, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """Return the rows of the batch whose class this rank holds, and the columns of those classes."""
    rows = torch.nonzero((labels_B >= shard.start) & (labels_B < shard.stop)).squeeze(1)
    return rows, labels_B[rows] - shard.start


def initial_rows(seed: int, shard: ClassShard, dim: int) -> Tensor:
    """Return C x D float32 rows of length about 1, each a function of (seed, class) and of nothing else.

    Row k is drawn from a counter-based generator keyed by (seed, k // 4096), so any rank can make any rows
    without making those before them.
    """
    rows_CD = torch.empty(len(shard), dim)
    first = shard.start - shard.start % _ROWS_PER_KEY
    for start in range(first, shard.stop, _ROWS_PER_KEY):
        generator = np.random.Generator(np.random.Philox(key=[seed, start // _ROWS_PER_KEY]))
        block = torch.from_numpy(generator.standard_normal((_ROWS_PER_KEY, dim), dtype=np.float32))
        low, high = max(start, shard.start), min(start + _ROWS_PER_KEY, shard.stop)
        rows_CD[low - shard.start : high - shard.start] = block[low - start : high - start]
    return rows_CD.div_(dim**0.5)
