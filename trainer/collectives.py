"""Every tensor that travels between ranks in a step, each with its gradient.

Whoever wants to know what a step sends reads this file. All functions are collective: *every* rank of
``group`` must call them, in the same order. Legend: N rows of this rank, B = N * ranks, any further
dimensions are written ``...``.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

T = TypeVar("T")

# torch 2.14 renamed the two and warns about the old names; aarch64 is still on 2.9.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherBatch(torch.autograd.Function):
    """Forward: all-gather rows. Backward: reduce-scatter the sum, the exact adjoint of the gather."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x_B = x_N.new_empty((x_N.shape[0] * group.size(), *x_N.shape[1:]))
        _all_gather_single(x_B, x_N.contiguous(), group=group)
        return x_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_N = grad_B.new_empty((grad_B.shape[0] // ctx.group.size(), *grad_B.shape[1:]))
        _reduce_scatter_single(grad_N, grad_B.contiguous(), group=ctx.group)
        return grad_N, None


class _UndoRankAverage(torch.autograd.Function):
    """Forward: identity. Backward: times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        return x_N.view_as(x_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_N * ctx.num_ranks, None


class _SumOfParts(torch.autograd.Function):
    """Forward: all-reduce SUM. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def gather_batch(x_N: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks, (N, ...) -> (B, ...), in rank order; N must be equal on all ranks.

    Each rank gets the same B rows. In backward rank r gets the sum over ranks of the gradients of *its*
    rows, so a loss whose parts live on different ranks is differentiated exactly.
    """
    return x_N if group.size() == 1 else _GatherBatch.apply(x_N, group)


def gather_labelled(x_ND: Tensor, labels_N: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """``gather_batch`` of float32 rows and their int64 labels in one all-gather."""
    as_floats_N2 = labels_N.contiguous().view(torch.float32).view(-1, 2)  # bits, which travel unchanged
    both_BE = gather_batch(torch.cat([x_ND, as_floats_N2], dim=1), group)
    labels_B = both_BE[:, -2:].detach().contiguous().view(torch.int64).squeeze(1)
    return both_BE[:, :-2], labels_B


def gather_rows(x_CD: Tensor, rows_of_rank: Sequence[int], group: ProcessGroup) -> Tensor:
    """``gather_batch`` of a matrix whose rank r holds ``rows_of_rank[r]`` rows; its gradient is as exact."""
    longest = max(rows_of_rank)
    padded = torch.cat([x_CD, x_CD.new_zeros((longest - x_CD.shape[0], *x_CD.shape[1:]))])
    gathered = gather_batch(padded, group).unflatten(0, (group.size(), longest))
    return torch.cat([rows[:n] for rows, n in zip(gathered, rows_of_rank, strict=True)])


def undo_rank_average(x_N: Tensor, group: ProcessGroup) -> Tensor:
    """Return x unchanged and multiply its gradient by the number of ranks R.

    The one home of this factor. The loss L is already the mean over the *global* batch, so the backbone's
    gradient is the sum of the ranks' parts, dL/dw = sum_r dL/df_r df_r/dw. DeepSpeed averages the parts,
    1/R sum_r; R times the gradient of the embeddings gives the sum. AdamW would hide a wrong factor;
    ``tests/test_joint.py`` pins it with SGD. Communicates nothing.
    """
    return _UndoRankAverage.apply(x_N, group.size())


def sum_of_parts(part: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks of the parts of a loss; its gradient is that of this rank's own part.

    With features from ``gather_batch`` that is exact: its backward adds up what every part asks of a row.
    """
    return _SumOfParts.apply(part, group)


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks, the same on each; any shape and type; no gradient."""
    return _all_reduced(x, ReduceOp.SUM, group)


def total_of_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks, the same on each; the gradient of each is that of its own part.

    For a total that *every* rank adds to its loss, whose gradients are summed over ranks later.
    """
    return sum_over(x, group) + (x - x.detach())


def max_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the element-wise maximum over ranks, the same on each; no gradient."""
    return _all_reduced(x, ReduceOp.MAX, group)


def start_max_over(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin ``max_over``; what is returned waits for it and gives the maximum. Others may run meanwhile."""
    total = x.detach().clone()
    if group.size() == 1:
        return lambda: total
    work = dist.all_reduce(total, ReduceOp.MAX, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return total

    return finish


def concatenate_over(x_N: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks in rank order, N may differ between them; no gradient.

    Costs one extra all-reduce for the lengths and pads to the longest while travelling.
    """
    lengths = torch.zeros(group.size(), dtype=torch.int64, device=x_N.device)
    lengths[group.rank()] = x_N.shape[0]
    lengths = sum_over(lengths, group)
    longest = int(lengths.max())
    padded = x_N.new_zeros((longest, *x_N.shape[1:]))
    padded[: x_N.shape[0]] = x_N
    gathered = gather_batch(padded.detach(), group).unflatten(0, (group.size(), longest))
    return torch.cat([rows[:n] for rows, n in zip(gathered, lengths.tolist(), strict=True)])


def from_main(value: T, group: ProcessGroup) -> T:
    """Return rank 0's value, a small plain Python object, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def from_all(value: T, group: ProcessGroup) -> list[T]:
    """Return the values of all ranks, small plain Python objects, in rank order."""
    values: list[T | None] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return cast(list[T], values)


def wait_for_all(group: ProcessGroup) -> None:
    """Return when every rank has come here."""
    dist.barrier(group=group)


def _all_reduced(x: Tensor, operation: Any, group: ProcessGroup) -> Tensor:
    """Return what ``operation`` makes of all ranks' x. One rank alone need not wait for gloo's thread."""
    result = x.detach().clone()
    if group.size() > 1:
        dist.all_reduce(result, operation, group=group)
    return result
