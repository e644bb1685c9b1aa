"""One optimizer step on some rows of a matrix: torch's own fused kernels, on slices.

Rows may be stored in bfloat16. A step of training is far smaller than bfloat16's spacing, so rounding to the
nearest would throw most steps away; rounding up or down at random, with the right probabilities, keeps their
sum. The random bits are a function of (seed, step, class), whoever holds the class.

Legend: C rows of the matrix, D width, T rows of a slice.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.sgd import sgd

from trainer.order import fold

_TABLE_ROWS = 1024


class RowAdagrad(Optimizer):
    """Adagrad with one number per row, the mean square of its gradients: state of 4 bytes a class.

    h <- h + mean_d g_d^2;  w <- (1 - lr weight_decay) w - lr g / (sqrt(h) + eps).  Source: Duchi et al.
    2011, with the second moment shared by a row as in DLRM's row-wise sparse Adagrad (arXiv 1906.00091).
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply ``.grad`` of every parameter; the first dimension counts rows."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["square_sum"] = torch.zeros(len(parameter), device=parameter.device)
                    _row_adagrad(parameter, parameter.grad, state["square_sum"], group)


class RowUpdate:
    """Applies an optimizer to slices of one parameter, with the state and settings of that optimizer.

    The optimizer itself is not stepped: it holds learning rate and state, so a checkpoint of it is complete
    and the same parameter can go on with an ordinary gradient.
    """

    def __init__(self, optimizer: Optimizer, parameter: Tensor, *, first_row: int, seed: int) -> None:
        self.parameter, self.first_row, self.seed = parameter, first_row, seed
        self.optimizer = optimizer
        (self._group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        self._noise_PD: Tensor | None = None
        self._buffers: list[Tensor] = []

    def begin_step(self, step: int) -> None:
        """Count a step of the optimizer; ``step``, from 0, selects the random bits."""
        state = self.optimizer.state[self.parameter]
        if "step" in state:
            state["step"] += 1
        if self.parameter.dtype == torch.bfloat16:
            dim, device = self.parameter.shape[1], self.parameter.device
            if self._noise_PD is None:
                self._noise_PD = torch.empty(2 * _TABLE_ROWS, dim, dtype=torch.int32, device=device)
            generator = torch.Generator(device).manual_seed(fold(self.seed, step) >> 1)
            self._noise_PD[:_TABLE_ROWS].random_(1 << 16, generator=generator)
            # Again below: any slice of rows is then one slice of the table.
            self._noise_PD[_TABLE_ROWS:] = self._noise_PD[:_TABLE_ROWS]

    def apply(self, rows: slice | Tensor, rows_TD: Tensor, gradient_TD: Tensor) -> None:
        """Update some rows, neighbours or listed, whose float32 values are ``rows_TD``.

        ``rows_TD`` is changed; it may be the slice of the parameter itself.
        """
        state = self.optimizer.state[self.parameter]
        names = [name for name, value in state.items() if value.ndim]
        stored = [state[name][rows] for name in names]  # a view of neighbours, a copy of listed ones
        moments = [self._as_float32(i, tensor) for i, tensor in enumerate(stored)]
        self._step(rows_TD, gradient_TD, moments, state)
        if self.parameter.dtype == torch.bfloat16:
            self._round(rows_TD, rows, self.parameter, 0)
            for name, value in zip(names, moments, strict=True):
                if name == "exp_avg_sq":  # moves by a thousandth a step, which rounding to nearest would lose
                    self._round(value, rows, state[name], _TABLE_ROWS // 2)
                else:
                    state[name][rows] = value.to(state[name].dtype)
        elif not isinstance(rows, slice):
            self.parameter[rows] = rows_TD
            for name, value in zip(names, moments, strict=True):
                state[name][rows] = value

    def _as_float32(self, number: int, values: Tensor) -> Tensor:
        """Return the values themselves if they are float32, else in a buffer that lasts: as in Workspace."""
        if values.dtype == torch.float32:
            return values
        if number == len(self._buffers):
            self._buffers.append(torch.empty(values.shape, device=values.device))
        return self._buffers[number][: len(values)].copy_(values)

    def _step(self, rows_TD: Tensor, gradient_TD: Tensor, moments: list[Tensor], state: dict) -> None:
        group = self._group
        if isinstance(self.optimizer, SGD):
            buffers: list[Tensor | None] = [*moments] or [None]
            settings = {k: group[k] for k in ("weight_decay", "momentum", "lr", "dampening", "nesterov")}
            sgd([rows_TD], [gradient_TD], buffers, foreach=False, fused=True, maximize=False, **settings)
        elif isinstance(self.optimizer, AdamW):
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                [rows_TD],
                [gradient_TD],
                [moments[0]],
                [moments[1]],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        else:
            _row_adagrad(rows_TD, gradient_TD, moments[0], group)

    def _round(self, values_TD: Tensor, rows: slice | Tensor, target_CD: Tensor, offset: int) -> None:
        """Write float32 values into bfloat16, up or down at random: unbiased. ``values_TD`` is destroyed."""
        assert self._noise_PD is not None
        if not isinstance(rows, slice):
            noise_TD = self._noise_PD[(self.first_row + offset + rows) % _TABLE_ROWS]
            target_CD[rows] = _rounded(values_TD, noise_TD).to(target_CD.dtype)
            return
        start = (self.first_row + offset + rows.start) % _TABLE_ROWS  # the same for every part
        parts = zip(values_TD.split(_TABLE_ROWS), target_CD[rows].split(_TABLE_ROWS), strict=True)
        for values, target in parts:
            target.copy_(_rounded(values, self._noise_PD[start : start + len(values)]))


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Return the values, changed in place, as float32 numbers that are bfloat16 exactly."""
    values.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)
    return values


def _row_adagrad(rows: Tensor, gradient: Tensor, square_sum: Tensor, group: dict[str, Any]) -> None:
    """Update ``rows`` and ``square_sum`` in place."""
    square_sum += gradient.reshape(len(gradient), -1).square().mean(1)
    length = square_sum.sqrt().add_(group["eps"]).view(-1, *[1] * (rows.ndim - 1))
    rows.mul_(1.0 - group["lr"] * group["weight_decay"])
    rows.addcdiv_(gradient, length.expand_as(rows), value=-group["lr"])
