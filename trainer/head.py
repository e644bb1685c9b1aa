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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from trainer.collectives import gather_batch, gather_labelled, max_over, sum_over, total_of_parts
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

    def times(self, rows: int) -> "ClassShard":
        """Return the same cut, counted in rows where every class has so many."""
        return ClassShard(self.start * rows, self.stop * rows, self.num_classes * rows)

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

    norm_is_cheap = True
    """Whether ``squared_norm`` is much faster than ``update``."""

    can_judge = True
    """Whether it holds a row per class, by which an image can be classified."""

    is_per_image = True
    """Whether the loss of a batch is a mean over its images, each without regard to the others."""

    last_seen_C: Tensor

    def __init__(self, shard: ClassShard, group: ProcessGroup, row_shard: ClassShard | None = None) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        self.row_shard = row_shard or shard
        """Which rows of all this rank holds: one a class, or ``sub_centroids``."""
        self.step, self._first_step = 0, -1
        self.register_buffer("last_seen_C", torch.zeros(len(shard), dtype=torch.int32), persistent=False)

    def begin_step(self, step: int) -> None:
        """Say which step of training, from 0, the next batches belong to."""
        if self._first_step < 0:  # nothing is known of the steps before
            self.last_seen_C.fill_(step)
            self._first_step = step
        self.step = step

    def mark_seen(self, labels_B: Tensor) -> None:
        """Note that these classes have a sample in this step."""
        places_B = labels_B - self.shard.start
        is_own_B = (places_B >= 0) & (places_B < len(self.shard))
        seen_B = (is_own_B * self.step).to(torch.int32)  # 0, which raises nothing, for the classes of others
        self.last_seen_C.scatter_reduce_(0, places_B.clamp(0, len(self.shard) - 1), seen_B, "amax")

    def num_dead(self, steps: int) -> Tensor:
        """Return how many of all classes had no sample in that many steps. Every rank must call it."""
        return sum_over((self.step - self.last_seen_C >= steps).sum(), self.group)

    def squared_norm(self) -> Tensor:
        """Return the squared length of the gradient of this rank's rows (float64); communicates nothing."""
        return squared_length(self.parameters())

    def norm_bound(self) -> float:
        """Return a number that the length of the gradient over all ranks does not exceed; cheap."""
        return float("inf")

    def rows_by_angle(self) -> list[Tensor]:
        """Return the rows whose directions stand for classes, and whose lengths for nothing: C x D each."""
        return []

    def update_in_backward(self, optimizer: Optimizer, step: int) -> None:
        """Allow the next batch to be applied as it is by its backward pass; ``update`` follows as ever."""

    @torch.no_grad()
    def update(self, optimizer: Optimizer, *, divisor: float, step: int) -> Tensor:
        """Divide the gradient by ``divisor`` and apply it; return its squared length before that."""
        squared_norm = apply_gradients(self.parameters(), optimizer, divisor)
        self.settle()
        return squared_norm

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return loss and metrics of a batch that every rank holds whole. Every rank must call it."""
        raise NotImplementedError

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        raise NotImplementedError

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the share of a whole batch whose nearest direction is the right one. Collective."""
        raise NotImplementedError

    def settle(self) -> None:
        """Move what moves without a gradient; only called in a step that is applied."""

    def statistics(self) -> dict[str, Tensor]:
        """Return the running numbers of the loss, the same on every rank: a checkpoint keeps them."""
        return {}

    def accuracy_by_centres(self, embeddings_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the accuracies of a whole batch by class centres, if the loss keeps any. Collective."""
        return {}

    def end_step(self, applied: bool = True) -> None:
        """Forget the gradient: it was used, or the step was skipped."""
        self.zero_grad()


class CocoHead(DenseHead):
    """Scaled cosine softmax over learned centroids, by an ordinary gradient; ``loss`` may add a margin.

    With S = ``sub_centroids`` above 1 a class has S rows, one after another, and its cosine is the highest
    (sub-center ArcFace, ECCV 2020: noise gathers around rows of its own). ``label_smoothing`` e gives every
    class, the target too, e / K of the target's probability (1512.00567).

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
        sub_centroids: int = 1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(shard, group, shard.times(sub_centroids))
        self.loss, self.sub_centroids, self.label_smoothing = loss, sub_centroids, label_smoothing
        self.centroids_CD = nn.Parameter(initial_centroids(seed, self.row_shard, dim, row_type))
        self._observed: list[tuple[Tensor, ...]] = []

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
        if self.sub_centroids > 1:
            cosine_BC = cosine_BC.unflatten(1, (-1, self.sub_centroids)).max(2).values
        targets_B, others_B = target_and_other(cosine_BC.detach(), labels_B, self.shard, self.group)
        rows, columns = own_targets(labels_B, self.shard)
        z_CB, _ = self.loss.others(self.loss.scale * cosine_BC.T, targets_B)
        # A margin may look at the whole batch; only the targets of this rank have a gradient.
        own_cosines_B = targets_B.index_put((rows,), cosine_BC[rows, columns])
        z_target_B = self.loss.target(own_cosines_B, lengths_B)
        z_BC = z_CB.T.index_put((rows, columns), z_target_B[rows].to(z_CB.dtype))
        if self.loss.is_unified:
            terms_BC = self.loss.weight * F.softplus(z_BC - self.loss.bias)
            target_terms_B = F.softplus(self.loss.bias - z_target_B)
            terms_BC = terms_BC.index_put((rows, columns), target_terms_B[rows].to(terms_BC.dtype))
            loss_B = total_of_parts(terms_BC.sum(1), self.group)
        else:
            loss_B, *_ = _ShardedCrossEntropy.apply(z_BC, labels_B, self.shard, self.group)
        if self.label_smoothing:
            mean_B = total_of_parts(z_BC.sum(1), self.group) / self.shard.num_classes
            loss_B = loss_B + self.label_smoothing * (z_target_B - mean_B)
        if torch.is_grad_enabled():
            self.mark_seen(labels_B)
            statistics = self._statistics(z_BC.detach(), cosine_BC.detach(), rows, columns)
            self.observe_later(targets_B, lengths_B.detach(), *statistics)
        if (penalty_B := self.loss.penalty(lengths_B)) is not None:
            # Every rank adds all of it; its gradient comes from one, for the gather sums over ranks.
            is_own_B = torch.zeros_like(penalty_B).index_fill(0, rows, 1.0)
            loss_B = loss_B + penalty_B.detach() + is_own_B * (penalty_B - penalty_B.detach())
        return self._output(loss_B.mean(), targets_B, others_B)

    def _statistics(
        self, z_BC: Tensor, cosine_BC: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log sum exp(z) over all classes but the target, and what ``loss.learn`` calls slope."""
        zeros_B = z_BC.new_zeros(len(z_BC))
        if self.loss.learns == "bias":
            slope_BC = -torch.sigmoid(z_BC - self.loss.bias)
            slope_BC[rows, columns] = 0.0
            return zeros_B, sum_over(slope_BC.sum(1), self.group)
        if not (self.loss.observes_sums or self.loss.learns):
            return zeros_B, zeros_B
        highest = self.loss.highest_logit()
        e_BC = (z_BC.double() - highest).exp_()
        e_BC[rows, columns] = 0.0
        sum_B = sum_over(e_BC.sum(1), self.group)
        slope_B = sum_over((e_BC * cosine_BC).sum(1), self.group) / sum_B
        return sum_B.log() + highest, slope_B

    def _output(self, loss: Tensor, targets_B: Tensor, others_B: Tensor) -> HeadOutput:
        metrics = {
            "accuracy": (targets_B > others_B).float().mean(),
            "cosine_target": targets_B.mean(),
            "cosine_nearest_other": others_B.mean(),
        }
        return HeadOutput(loss, metrics)

    def observe_later(self, targets_B: Tensor, lengths_B: Tensor, log_sum_B: Tensor, slope_B: Tensor) -> None:
        """Remember a (micro-)batch for ``end_step``: the loss must not change between its two uses."""
        self._observed.append((targets_B, lengths_B, log_sum_B, slope_B))

    def end_step(self, applied: bool = True) -> None:
        """Forget the gradient; if it was used, move the statistics of the loss by what the step has seen."""
        super().end_step(applied)
        if self._observed and applied:
            targets_B, lengths_B, log_sum_B, slope_B = (
                torch.cat(p) for p in zip(*self._observed, strict=True)
            )
            self.loss.observe(targets_B, lengths_B, log_sum_B)
            self.loss.learn(targets_B, log_sum_B, slope_B)
        self._observed.clear()

    def statistics(self) -> dict[str, Tensor]:
        """Return the running statistics of a margin; COCO has none."""
        return dict(self.loss.named_buffers())

    def rows_by_angle(self) -> list[Tensor]:
        """Return the centroids."""
        return [self.centroids_CD]

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.centroids_CD.detach().float())

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the share of a whole batch whose nearest centroid is the right one. Collective."""
        return self.of_embeddings(embeddings_BD, labels_B).metrics["accuracy"]


class SoftmaxHead(DenseHead):
    """Plain softmax over inner products, with or without a bias, cut the same way: the baseline."""

    def __init__(
        self, shard: ClassShard, dim: int, *, seed: int, group: ProcessGroup, has_bias: bool = True
    ) -> None:
        super().__init__(shard, group)
        self.weight_CD = nn.Parameter(initial_rows(seed, shard, dim))
        self.bias_C = nn.Parameter(torch.zeros(len(shard))) if has_bias else None

    def forward(self, embeddings_ND: Tensor, labels_N: Tensor) -> HeadOutput:
        """Return loss and metrics of the global batch. Every rank must call it, with equal N."""
        embeddings_BD = gather_batch(embeddings_ND.float(), self.group)
        return self.of_embeddings(embeddings_BD, gather_batch(labels_N, self.group))

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for a batch that every rank holds whole. Every rank must call it."""
        z_BC = embeddings_BD @ self.weight_CD.T
        if self.bias_C is not None:
            z_BC = z_BC + self.bias_C
        if torch.is_grad_enabled():
            self.mark_seen(labels_B)
        loss_B, target_B, other_B = _ShardedCrossEntropy.apply(z_BC, labels_B, self.shard, self.group)
        return HeadOutput(loss_B.mean(), {"accuracy": (target_B > other_B).float().mean()})

    def rows_by_angle(self) -> list[Tensor]:
        """Return the rows of the classifier."""
        return [self.weight_CD]

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.weight_CD.detach())

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the share of a whole batch whose nearest row, by angle, is the right one."""
        cosine_BC = F.normalize(embeddings_BD.float()) @ self.directions_CD().T
        target_B, other_B = target_and_other(cosine_BC, labels_B, self.shard, self.group)
        return (target_B > other_B).float().mean()


def squared_length(parameters: Iterable[Tensor]) -> Tensor:
    """Return the squared length of the gradients that there are, as a float64."""
    parameters = list(parameters)
    device = parameters[0].device if parameters else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return sum((norm.square() for norm in norms), torch.zeros((), dtype=torch.float64, device=device))


def apply_gradients(parameters: Iterable[Tensor], optimizer: Optimizer, divisor: float) -> Tensor:
    """Divide the gradients by ``divisor`` and apply them; return their squared length before that."""
    parameters = list(parameters)
    squared_norm = squared_length(parameters)
    for parameter in parameters:
        if parameter.grad is not None and divisor != 1.0:
            parameter.grad.div_(divisor)
    optimizer.step()
    return squared_norm


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


def initial_centroids(
    seed: int, shard: ClassShard, dim: int, row_type: torch.dtype = torch.float32
) -> Tensor:
    """Return C x D rows to begin with: random, but in 2 and 3 dimensions evenly spread, turned by the seed.

    Random points crowd on a circle or a sphere, and a class that lies between two others has little way
    around them. 2: equal angles. 3: the Fibonacci sphere. Each row is a function of (seed, class, number of
    classes).
    """
    if dim not in (2, 3):
        return initial_rows(seed, shard, dim, row_type)
    k_C1 = torch.arange(shard.start, shard.stop, dtype=torch.float64)[:, None] + 0.5
    turns_C1 = k_C1 / shard.num_classes if dim == 2 else k_C1 * (3 - 5**0.5) / 2
    points_CD = torch.cat([torch.cos(2 * torch.pi * turns_C1), torch.sin(2 * torch.pi * turns_C1)], dim=1)
    if dim == 3:
        height_C1 = 1 - 2 * k_C1 / shard.num_classes
        points_CD = torch.cat([points_CD * (1 - height_C1.square()).sqrt(), height_C1], dim=1)
    turn_DD = torch.linalg.qr(initial_rows(seed, ClassShard(0, dim, dim), dim).double()).Q
    # Not a matrix product, whose rounding may depend on the number of rows.
    return (points_CD[:, :, None] * turn_DD).sum(1).to(row_type)
