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
from torch.optim import Optimizer

from trainer.collectives import gather_batch, gather_labelled, max_over, sum_over
from trainer.margins import CosineSoftmax

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


class DenseHead(nn.Module):
    """Rows with an ordinary gradient, and what a step does with it."""

    shard: ClassShard
    group: ProcessGroup
    norm_is_cheap = True
    """Whether ``squared_norm`` is much faster than ``update``."""

    def squared_norm(self) -> Tensor:
        """Return the squared length of the gradient of this rank's rows (float64); communicates nothing."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        return torch.stack(norms).square().sum()

    @torch.no_grad()
    def update(self, optimizer: Optimizer, *, divisor: float, step: int) -> Tensor:
        """Divide the gradient by ``divisor`` and apply it; return its squared length before that."""
        squared_norm = self.squared_norm()
        for parameter in self.parameters():
            if parameter.grad is not None and divisor != 1.0:
                parameter.grad.div_(divisor)
        optimizer.step()
        return squared_norm

    def end_step(self) -> None:
        """Forget the gradient: it was used, or the step was skipped."""
        self.zero_grad()


class CocoHead(DenseHead):
    """Scaled cosine softmax over learned centroids, by an ordinary gradient; ``loss`` may add a margin.

    ``trainer/fused.py`` does the same in a fraction of the memory; this one is for research, and its judge.
    """

    def __init__(
        self,
        shard: ClassShard,
        dim: int,
        *,
        loss: CosineSoftmax,
        seed: int,
        group: ProcessGroup,
        row_type: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shard, self.loss, self.group = shard, loss, group
        self.centroids_CD = nn.Parameter(initial_rows(seed, shard, dim, row_type))
        self._observed: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, embeddings_ND: Tensor, labels_N: Tensor) -> HeadOutput:
        """Return loss and metrics of the global batch. Every rank must call it, with equal N."""
        embeddings_ND = embeddings_ND.float()
        lengths_N = torch.linalg.vector_norm(embeddings_ND, dim=1)
        batch_ND = torch.cat([F.normalize(embeddings_ND), lengths_N[:, None]], dim=1)
        batch_BD, labels_B = gather_labelled(batch_ND, labels_N, self.group)
        return self.of_features(batch_BD[:, :-1].contiguous(), batch_BD[:, -1], labels_B)

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for a batch that every rank holds whole. Every rank must call it."""
        embeddings_BD = embeddings_BD.float()
        lengths_B = torch.linalg.vector_norm(embeddings_BD, dim=1)
        return self.of_features(F.normalize(embeddings_BD), lengths_B, labels_B)

    def of_features(self, features_BD: Tensor, lengths_B: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for unit features and the lengths they had. Every rank must call it."""
        cosine_BC = features_BD @ F.normalize(self.centroids_CD.float()).T
        targets_B, others_B = target_and_other(cosine_BC.detach(), labels_B, self.shard, self.group)
        rows, columns = own_targets(labels_B, self.shard)
        z_CB, _ = self.loss.others(self.loss.scale * cosine_BC.T, targets_B)
        # A margin may look at the whole batch; only the targets of this rank have a gradient.
        own_cosines_B = targets_B.index_put((rows,), cosine_BC[rows, columns])
        z_target_B = self.loss.target(own_cosines_B, lengths_B)
        z_BC = z_CB.T.index_put((rows, columns), z_target_B[rows])
        loss_B, *_ = _ShardedCrossEntropy.apply(z_BC, labels_B, self.shard, self.group)
        if torch.is_grad_enabled():
            log_sum_B = self._log_sum_of_others(z_BC.detach(), rows, columns)
            self.observe_later(targets_B, lengths_B.detach(), log_sum_B)
        if (penalty_B := self.loss.penalty(lengths_B)) is not None:
            # Every rank adds all of it; its gradient comes from one, for the gather sums over ranks.
            is_own_B = torch.zeros_like(penalty_B).index_fill(0, rows, 1.0)
            loss_B = loss_B + penalty_B.detach() + is_own_B * (penalty_B - penalty_B.detach())
        return self._output(loss_B.mean(), targets_B, others_B)

    def _log_sum_of_others(self, z_BC: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return log sum exp(z) over all classes but the target, for the losses that look at it."""
        if not self.loss.observes_sums:
            return z_BC.new_zeros(len(z_BC))
        highest = self.loss.highest_logit()
        e_BC = (z_BC.double() - highest).exp_()
        e_BC[rows, columns] = 0.0
        return sum_over(e_BC.sum(1), self.group).log() + highest

    def _output(self, loss: Tensor, targets_B: Tensor, others_B: Tensor) -> HeadOutput:
        metrics = {
            "accuracy": (targets_B > others_B).float().mean(),
            "cosine_target": targets_B.mean(),
            "cosine_nearest_other": others_B.mean(),
        }
        return HeadOutput(loss, metrics)

    def observe_later(self, targets_B: Tensor, lengths_B: Tensor, log_sum_B: Tensor) -> None:
        """Remember a (micro-)batch for ``end_step``: the loss must not change between its two uses."""
        self._observed.append((targets_B, lengths_B, log_sum_B))

    def end_step(self) -> None:
        """Forget the gradient, and move the running statistics of the loss by what the step has seen."""
        super().end_step()
        if self._observed:
            self.loss.observe(*(torch.cat(parts) for parts in zip(*self._observed, strict=True)))
        self._observed.clear()

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.centroids_CD.detach().float())

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the share of a whole batch whose nearest centroid is the right one. Collective."""
        return self.of_embeddings(embeddings_BD, labels_B).metrics["accuracy"]


class SoftmaxHead(DenseHead):
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

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the share of a whole batch whose nearest row, by angle, is the right one."""
        cosine_BC = F.normalize(embeddings_BD.float()) @ self.directions_CD().T
        target_B, other_B = target_and_other(cosine_BC, labels_B, self.shard, self.group)
        return (target_B > other_B).float().mean()


def target_and_other(z_BC: Tensor, labels_B: Tensor, shard: ClassShard, group: ProcessGroup) -> Tensor:
    """Return 2 x B: every target's score, and the highest score of any other class on any rank.

    Every rank must call it with the scores of its own classes; each gets the same. One all-reduce MAX.
    """
    rows, columns = own_targets(labels_B, shard)
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
        rows, columns = own_targets(labels_B, ctx.shard)
        grad_BC = p_BC * grad_B[:, None]
        grad_BC[rows, columns] -= grad_B[rows]
        return grad_BC, None, None, None


def own_targets(labels_B: Tensor, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """Return the rows of the batch whose class this rank holds, and the columns of those classes."""
    rows = torch.nonzero((labels_B >= shard.start) & (labels_B < shard.stop)).squeeze(1)
    return rows, labels_B[rows] - shard.start


def initial_rows(seed: int, shard: ClassShard, dim: int, row_type: torch.dtype = torch.float32) -> Tensor:
    """Return C x D rows of length about 1, each a function of (seed, class) and of nothing else.

    Row k is drawn from a counter-based generator keyed by (seed, k // 4096), so any rank can make any rows
    without making those before them.
    """
    rows_CD = torch.empty(len(shard), dim, dtype=row_type)
    first = shard.start - shard.start % _ROWS_PER_KEY
    for start in range(first, shard.stop, _ROWS_PER_KEY):
        generator = np.random.Generator(np.random.Philox(key=[seed, start // _ROWS_PER_KEY]))
        block = torch.from_numpy(generator.standard_normal((_ROWS_PER_KEY, dim), dtype=np.float32))
        block /= dim**0.5
        low, high = max(start, shard.start), min(start + _ROWS_PER_KEY, shard.stop)
        rows_CD[low - shard.start : high - shard.start] = block[low - start : high - start]
    return rows_CD
