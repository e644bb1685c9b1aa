"""What travels between ranks, and the ranks themselves. Legend: N rows of a rank, B of all, R ranks."""

import os
import time

import pytest
import torch
from ranks import RankError, run_on_ranks
from torch import Tensor

from trainer.collectives import (
    concatenate_over,
    from_main,
    gather_batch,
    max_over,
    sum_over,
    undo_rank_average,
    wait_for_all,
)
from trainer.distributed import World

NUM_RANKS = [1, 2, 3]


def rows_of(rank: int, num_rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(num_rows, 4, 3, generator=generator)


def weights_of(rank: int, num_ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.randn(2 * num_ranks, 4, 3, generator=generator)


def gathered_and_gradients(world: World) -> dict[str, Tensor]:
    """Each rank has a loss of its own over the gathered rows; the sum of the losses is differentiated."""
    x_N = rows_of(world.rank).requires_grad_()
    x_B = gather_batch(x_N, world.group)
    (x_B.square() * weights_of(world.rank, world.size)).sum().backward()
    y_N = rows_of(world.rank).requires_grad_()
    undo_rank_average(y_N, world.group).square().sum().backward()
    labels_N = torch.arange(3) + 10 * world.rank
    # A view that is not contiguous must arrive in its own order.
    turned_N = rows_of(world.rank).transpose(1, 2)
    return {
        "gathered": x_B.detach(),
        "gradient": x_N.grad,
        "gradient_times_ranks": y_N.grad,
        "labels": gather_batch(labels_N, world.group),
        "turned": gather_batch(turned_N, world.group),
    }


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_gather_keeps_rank_order_and_its_gradient_is_the_sum_over_ranks(num_ranks: int) -> None:
    results = run_on_ranks(gathered_and_gradients, num_ranks)
    x_B = torch.cat([rows_of(rank) for rank in range(num_ranks)]).requires_grad_()
    sum((x_B.square() * weights_of(rank, num_ranks)).sum() for rank in range(num_ranks)).backward()
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], x_B.detach())
        assert torch.equal(result["turned"], x_B.detach().transpose(1, 2))
        assert result["labels"].tolist() == [10 * r + i for r in range(num_ranks) for i in range(3)]
        torch.testing.assert_close(result["gradient"], x_B.grad[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(result["gradient_times_ranks"], num_ranks * 2 * rows_of(rank))


def reductions(world: World) -> dict[str, object]:
    x = rows_of(world.rank)
    before = x.clone()
    numbers = torch.tensor([2**53 + 1, -world.rank])
    result = {
        "sum": sum_over(x, world.group),
        "max": max_over(x, world.group),
        "exact_integers": sum_over(numbers, world.group).tolist(),
        "input_kept": torch.equal(x, before),
        # Uneven on purpose, rank 1 has nothing at all.
        "uneven": concatenate_over(rows_of(world.rank, (3 * world.rank + 2) % 5), world.group),
        "uneven_integers": concatenate_over(torch.arange(world.rank), world.group).tolist(),
        "nothing": concatenate_over(torch.zeros(0, 4), world.group).shape,
        "from_main": from_main({"rank": world.rank, "names": ["a", "b"]}, world.group),
    }
    wait_for_all(world.group)
    return result


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_reductions_and_uneven_rows_are_the_same_on_every_rank(num_ranks: int) -> None:
    parts = torch.stack([rows_of(rank) for rank in range(num_ranks)])
    for result in run_on_ranks(reductions, num_ranks):
        torch.testing.assert_close(result["sum"], parts.sum(0))
        assert torch.equal(result["max"], parts.amax(0))
        assert result["exact_integers"] == [num_ranks * (2**53 + 1), -sum(range(num_ranks))]
        assert result["input_kept"]
        expected = torch.cat([rows_of(rank, (3 * rank + 2) % 5) for rank in range(num_ranks)])
        assert torch.equal(result["uneven"], expected)
        assert result["uneven_integers"] == [i for rank in range(num_ranks) for i in range(rank)]
        assert result["nothing"] == (0, 4)
        assert result["from_main"] == {"rank": 0, "names": ["a", "b"]}


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    wait_for_all(world.group)


def die_on_rank_0(world: World) -> None:
    if world.rank == 0:
        os._exit(7)


def hang_on_rank_1(world: World) -> None:
    if world.rank == 1:
        time.sleep(1000)
    wait_for_all(world.group)


def test_a_failing_dying_or_hanging_rank_fails_the_test_with_its_reason() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*fail_on_rank_1.*the reason"):
        run_on_ranks(fail_on_rank_1, 2)
    with pytest.raises(RankError, match="rank 0 ended with exit code 7"):
        run_on_ranks(die_on_rank_0, 1)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_on_ranks(hang_on_rank_1, 2, timeout_seconds=2.0)
