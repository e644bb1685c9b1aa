"""Updates of slices of a matrix: torch's optimizers on the whole, longhand loops, and rounding at random.

Legend: C rows of the matrix, D its width, T rows of a slice, S steps.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from trainer.optimizer import allocate_state
from trainer.rows import RowAdagrad, RowUpdate

NUM_ROWS, DIM = 37, 6
SLICES = [(0, 16), (16, 32), (32, 37)]
ULP = 2.0**-8  # of bfloat16 between 0.5 and 1, relative to 1: neighbours there are 2^-8 apart


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(step: int, rows: int = NUM_ROWS) -> Tensor:
    """Return gradients of very different lengths, as those of frequent and rare classes."""
    return random(rows, DIM, seed=100 + step) * torch.logspace(-3, 1, rows, dtype=torch.float64)[:, None]


@torch.no_grad()
def apply_(update: RowUpdate, gradient_CD: Tensor, step: int, slices: list[tuple[int, int]] = SLICES) -> None:
    """Take one step of all rows, a slice at a time."""
    update.begin_step(step)
    rows_CD = update.parameter.detach()
    for low, high in slices:
        rows_TD = rows_CD[low:high]
        if rows_TD.dtype != torch.float32:
            rows_TD = rows_TD.float()
        update.apply(slice(low, high), rows_TD, gradient_CD[low:high].float())


# --------------------------------------------------------------------------------------------- RowAdagrad


def test_row_adagrad_is_its_formula_written_as_a_loop() -> None:
    lr, decay, eps = 0.1, 0.3, 1e-3
    parameter = torch.nn.Parameter(random(NUM_ROWS, DIM, seed=0))
    still = torch.nn.Parameter(torch.ones(3, DIM))
    optimizer = RowAdagrad([parameter, still], lr=lr, weight_decay=decay, eps=eps)
    w, h = parameter.tolist(), [0.0] * NUM_ROWS
    for step in range(20):
        parameter.grad = gradient_of(step)
        g = parameter.grad.tolist()
        optimizer.param_groups[0]["lr"] = lr / (1 + step)  # a schedule sets it
        optimizer.step()
        for k in range(NUM_ROWS):
            h[k] += sum(x * x for x in g[k]) / DIM
            for d in range(DIM):
                w[k][d] = (1 - lr / (1 + step) * decay) * w[k][d]
                w[k][d] -= lr / (1 + step) * g[k][d] / (math.sqrt(h[k]) + eps)
    state = optimizer.state[parameter]
    assert list(state) == ["square_sum"]
    assert state["square_sum"].shape == (NUM_ROWS,)
    # The state is float32 whatever the rows are: 1e-7 of each sum, half of that of a step.
    torch.testing.assert_close(state["square_sum"].double(), tensor(h), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(parameter.detach(), tensor(w), rtol=0.0, atol=2e-7)
    assert torch.equal(still, torch.ones(3, DIM))  # without a gradient it is not decayed either
    assert not optimizer.state[still]


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_row_adagrad_counts_a_bias_as_rows_of_one_number() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = RowAdagrad([parameter], lr=0.5, eps=0.0)
    for _ in range(2):
        parameter.grad = torch.tensor([3.0, -4.0])
        optimizer.step()
    expected = torch.tensor([1.0 - 0.5 - 0.5 / math.sqrt(2), 2.0 + 0.5 + 0.5 / math.sqrt(2)])
    torch.testing.assert_close(parameter.detach(), expected)


# ------------------------------------------------------------------------------------- slices of float32

Choices = dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]]
OPTIMIZERS: Choices = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd, momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd, momentum, decay": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "sgd, nesterov, decay": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-6}),
    "row_adagrad": (RowAdagrad, {"lr": 0.1, "weight_decay": 0.2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slices_are_updated_as_the_optimizer_updates_the_whole(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    start_CD = random(NUM_ROWS, DIM, seed=1)
    whole = torch.nn.Parameter(start_CD.clone())  # float64
    reference = kind([whole], **settings)
    rows = torch.nn.Parameter(start_CD.float())
    other = torch.nn.Parameter(torch.ones(2))
    # Of several groups, the settings of the parameter's own count.
    groups: list[dict[str, Any]] = [
        {"params": [other], "lr": 9.0, "weight_decay": 0.9},
        {"params": [rows]},
    ]
    optimizer = kind(groups, **settings)
    allocate_state(optimizer)
    update = RowUpdate(optimizer, rows, first_row=11, seed=0)
    for step in range(20):
        whole.grad = gradient_of(step)
        lr = settings["lr"] / (1 + 0.1 * step)
        reference.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        reference.step()
        apply_(update, gradient_of(step), step)
    error = (rows.double() - whole).norm() / (whole - start_CD).norm()
    assert error < 1e-5  # 2e-7; AdamW, whose steps are the shortest beside the rows: 4e-6
    found, expected = optimizer.state[rows], reference.state[whole]
    for key, value in expected.items():
        if value is not None:  # SGD without momentum notes that it has none
            torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(other, torch.ones(2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_itself_may_go_on_where_slices_stopped(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    results = []
    for switch in (0, 2, 4):
        rows = torch.nn.Parameter(random(NUM_ROWS, DIM, seed=1).float())
        optimizer = kind([rows], **settings)
        allocate_state(optimizer)
        update = RowUpdate(optimizer, rows, first_row=0, seed=0)
        for step in range(4):
            if step < switch:
                apply_(update, gradient_of(step), step)
            else:
                rows.grad = gradient_of(step).float()
                optimizer.step()
        results.append(rows.detach().clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- bfloat16


class Walk:
    """Plain SGD with learning rate 1 of bfloat16 rows: what is asked for is subtracted and rounded."""

    def __init__(self, rows_CD: Tensor, first_class: int = 0, seed: int = 0) -> None:
        self.rows = torch.nn.Parameter(rows_CD.bfloat16())
        optimizer = SGD([self.rows], lr=1.0)
        allocate_state(optimizer)
        self.update = RowUpdate(optimizer, self.rows, first_row=first_class, seed=seed)

    def step(self, change: Tensor | float, step: int, slices: list[tuple[int, int]] | None = None) -> Tensor:
        """Add ``change`` to the rows, at random where bfloat16 has no such number; return them."""
        gradient_CD = -torch.as_tensor(change, dtype=torch.float64).expand(self.rows.shape)
        apply_(self.update, gradient_CD, step, slices or [(0, len(self.rows))])
        return self.rows.detach().clone()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [1 / 64, 0.3, 0.5, 0.9])
def test_rounding_ends_at_a_neighbour_and_is_right_on_average(sign: float, share: float) -> None:
    num_steps, shape = 50, (1500, 8)  # more rows than the table of random bits has
    start_CD = torch.full(shape, 0.75 * sign)
    total, ups_CD = 0.0, torch.zeros(shape)
    for step in range(num_steps):
        rows_CD = Walk(start_CD, seed=3).step(sign * share * ULP, step).float()
        assert set(rows_CD.unique().tolist()) == {0.75 * sign, (0.75 + ULP) * sign}
        ups_CD += rows_CD != start_CD
        total += float((rows_CD != start_CD)[:1024].double().mean()) / num_steps
    # 50 x 1024 x 8 independent draws.
    deviation = math.sqrt(share * (1 - share))
    assert abs(total - share) < 5 * deviation / math.sqrt(num_steps * 1024 * 8)
    # Every place of the matrix has its own draws, and new ones in each step.
    mean_CD = ups_CD / num_steps
    assert (mean_CD - share).abs().max() < 6.5 * deviation / math.sqrt(num_steps) + 1 / num_steps
    assert float(mean_CD[:1024].var()) == pytest.approx(deviation**2 / num_steps, rel=0.1)


def test_numbers_that_bfloat16_has_are_left_as_they_are() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    # All of them: of either sign, subnormal, the largest.
    rows_CD = numbers.reshape(-1, 8)
    walk = Walk(rows_CD)
    for step in range(3):
        assert torch.equal(walk.step(0.0, step), rows_CD)


def test_what_is_not_finite_stays_so() -> None:
    rows_CD = torch.tensor([[math.inf, -math.inf, math.nan, -math.nan]]).expand(1024, 4)
    for step in range(3):
        found_CD = Walk(rows_CD).step(0.0, step)
        assert torch.equal(found_CD[:, :2], rows_CD[:, :2].bfloat16())
        assert found_CD[:, 2:].isnan().all()


def test_random_bits_are_of_seed_step_and_class_and_not_of_slices_or_cuts() -> None:
    num_classes, dim = 3000, 4
    start_KD, change_KD = torch.full((num_classes, dim), 0.75), 0.5 * ULP
    whole = Walk(start_KD, seed=1).step(change_KD, 7)
    for cuts in ([0, 3000], [0, 1, 1024, 3000], [0, 1000, 2000, 3000], [0, 1500, 3000]):
        for tile in (64, 1000, 1024, 3000):
            parts = []
            for start, stop in pairwise(cuts):
                slices = [(low, min(low + tile, stop - start)) for low in range(0, stop - start, tile)]
                walk = Walk(start_KD[start:stop], first_class=start, seed=1)
                parts.append(walk.step(change_KD, 7, slices))
            assert torch.equal(torch.cat(parts), whole), (cuts, tile)
    for other in (Walk(start_KD, seed=2).step(change_KD, 7), Walk(start_KD, seed=1).step(change_KD, 8)):
        agreement = (other == whole)[:1024].double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(1024 * dim)
    # The bits of two places are independent, but for classes that are 1024 apart: those share them.
    signs_KD = (whole > 0.75).double() * 2 - 1
    for distance in (1, 2, 512):
        assert abs((signs_KD[:512] * signs_KD[distance : 512 + distance]).mean()) < 5 / math.sqrt(512 * dim)
    assert abs((signs_KD[:, 0] * signs_KD[:, 1])[:1024].mean()) < 5 / math.sqrt(1024)
    assert torch.equal(whole[1024:2048], whole[:1024])


def test_a_step_can_be_taken_again_after_a_restart() -> None:
    """Bits depend on the step's number and not on how many steps this process has taken."""
    rows_CD = random(200, 8, seed=4).float()
    walk = Walk(rows_CD)
    for step in range(5):
        before = walk.rows.detach().clone()
        after = walk.step(0.3 * ULP, step)
    assert torch.equal(Walk(before).step(0.3 * ULP, 4), after)


def test_steps_far_below_the_spacing_add_up_where_rounding_to_nearest_loses_them() -> None:
    # 1.07e-4 of an ulp, and 7 of a float32's: those add up exactly.
    num_steps, share = 2000, 7 / 2**16
    start_CD = torch.full((1024, 16), 0.75)
    walk = Walk(start_CD)
    nearest_CD, single_CD = start_CD.bfloat16(), start_CD.clone()
    for step in range(num_steps):
        rows_CD = walk.step(share * ULP, step)
        nearest_CD = (nearest_CD.float() + share * ULP).bfloat16()
        single_CD += share * ULP
    assert torch.equal(nearest_CD, start_CD.bfloat16())
    moved_CD = ((rows_CD.float() - start_CD) / ULP).double()
    assert torch.equal(moved_CD, moved_CD.round())  # whole ulps: 0.2 on average, a Poisson count
    expected = float((single_CD - start_CD).double().mean() / ULP)
    assert expected == pytest.approx(num_steps * share, rel=1e-12)
    assert float(moved_CD.mean()) == pytest.approx(expected, abs=5 * math.sqrt(expected / moved_CD.numel()))
    assert float(moved_CD.var()) == pytest.approx(expected, rel=0.1)


def test_training_in_bfloat16_follows_float32_with_every_optimizer() -> None:
    """400 short steps towards a goal; AdamW's second moment moves by 0.1 % a step and is followed too."""
    num_steps, rows, dim = 400, 512, 32
    goal_CD = random(rows, dim, seed=5) * 0.3
    settings: Choices = {
        "sgd": (SGD, {"lr": 1e-3, "momentum": 0.9}),
        "adamw": (AdamW, {"lr": 1e-3, "betas": (0.9, 0.999)}),
        "row_adagrad": (RowAdagrad, {"lr": 1e-2}),
    }
    for name, (kind, numbers) in settings.items():
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            parameter = torch.nn.Parameter(torch.ones(rows, dim, dtype=dtype))
            optimizer = kind([parameter], **numbers)
            allocate_state(optimizer)
            update = RowUpdate(optimizer, parameter, first_row=0, seed=0)
            for step in range(num_steps):
                gradient_CD = parameter.detach().double() - goal_CD + random(rows, dim, seed=step)
                apply_(update, gradient_CD, step, [(0, rows)])
            found.append((parameter.detach().double(), optimizer.state[parameter]))
        (single_CD, single), (half_CD, half) = found
        # Single numbers are a random walk of ulps apart; the mean of all 16384 is not: 0.1 % of its way.
        assert abs((half_CD - single_CD).mean() / (single_CD - 1.0).mean()) < 3e-3, name
        for key, value in single.items():
            ratio = half[key].double().mean() / value.double().mean()
            assert ratio == pytest.approx(1.0, abs=5e-3), (name, key)
        assert name != "row_adagrad" or half["square_sum"].dtype == torch.float32
