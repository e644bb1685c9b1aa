"""Optimizers of backbone and head: the same kind, built the same way, with their state allocated at once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from trainer.config import OptimConfig
from trainer.rows import RowAdagrad


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters: matrices and filters decay, biases and the scales of norms do not.

    A module without trained parameters gives one empty group.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or groups[:1]


def build_optimizer(
    config: OptimConfig, groups: Iterable[dict[str, Any]], name: str | None = None
) -> Optimizer:
    """Build the configured optimizer, or that of ``name``; its learning rate is set anew before every step.

    torch's fused kernels: one pass over memory, on CPU and GPU.
    """
    name = name or config.name
    if name == "sgd":
        return SGD(list(groups), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if name == "adamw":
        return AdamW(list(groups), lr=config.lr, betas=config.betas, fused=True)
    return RowAdagrad(list(groups), lr=config.lr)


def state_keys(optimizer: Optimizer) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer keeps for each parameter (row)."""
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    return ("exp_avg", "exp_avg_sq") if isinstance(optimizer, AdamW) else ("square_sum",)


def allocate_state(optimizer: Optimizer) -> None:
    """Create the state that torch would create in the first step, with the same values.

    Memory is then known before training, and a checkpoint has the same tensors at every step.
    """
    for parameter in parameters_of(optimizer):
        state = optimizer.state[parameter]
        if isinstance(optimizer, RowAdagrad):
            state["square_sum"] = torch.zeros(len(parameter), device=parameter.device)
            continue
        state.update({key: torch.zeros_like(parameter) for key in state_keys(optimizer)})
        if isinstance(optimizer, AdamW):
            state["step"] = torch.zeros((), device=parameter.device)  # where the fused kernel reads it


def steps_taken(optimizer: Optimizer) -> int:
    """Return how many steps AdamW's bias correction counts; 0 for SGD, which has none."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(counts[0]) if counts else 0


def set_steps_taken(optimizer: Optimizer, steps: int) -> None:
    """Restore what ``steps_taken`` returned."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of all groups, of a torch optimizer or of DeepSpeed's around one."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameters_of(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    """Yield the tensors that the optimizer updates (under ZeRO: this rank's flat parts)."""
    for group in optimizer.param_groups:
        yield from group["params"]
