"""Groups, state and step counts of the optimizers, and their arithmetic in longhand."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config import OptimConfig
from trainer.optimizer import (
    allocate_state,
    build_optimizer,
    parameter_groups,
    parameters_of,
    set_learning_rate,
    set_steps_taken,
    state_keys,
    steps_taken,
)

CONFIGS = {
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9),
    "nesterov": OptimConfig(name="sgd", lr=0.1, momentum=0.8, nesterov=True),
    "sgd without momentum": OptimConfig(name="sgd", lr=0.1, momentum=0.0),
    "adamw": OptimConfig(name="adamw", lr=0.01, betas=(0.8, 0.95)),
}
DECAY = 0.2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(4, 2)
    ).double()


def gradients_of(module: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()]


def train(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 0.1 / (step + 1))
        for parameter, gradient in zip(module.parameters(), gradients_of(module, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def build(config: OptimConfig) -> tuple[nn.Module, Optimizer]:
    module = network()
    return module, build_optimizer(config, parameter_groups(module, DECAY))


def test_matrices_and_filters_decay_and_biases_and_norms_do_not() -> None:
    module = network()
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {
        names[parameter]: group["weight_decay"]
        for group in parameter_groups(module, DECAY)
        for parameter in group["params"]
    }
    expected = dict.fromkeys(names.values(), 0.0) | {"0.weight": DECAY, "4.weight": DECAY}
    assert found == expected


def test_frozen_parameters_are_left_out_and_so_are_empty_groups() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
    module[1].requires_grad_(False)
    assert parameter_groups(module, DECAY) == [{"params": [module[0].weight], "weight_decay": DECAY}]


def longhand(config: OptimConfig, num_steps: int) -> list[Tensor]:
    """Return the parameters after the same steps, element-wise as the papers write them."""
    module = network()
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(num_steps):
        lr = 0.1 / (step + 1)
        for i, (w, g) in enumerate(zip(weights, gradients_of(module, step), strict=True)):
            decay = DECAY if w.ndim > 1 else 0.0
            if config.name == "sgd":
                g = g + decay * w
                first[i] = config.momentum * first[i] + g
                w -= lr * (g + config.momentum * first[i] if config.nesterov else first[i])
            else:
                a, b = config.betas
                first[i] = a * first[i] + (1 - a) * g
                second[i] = b * second[i] + (1 - b) * g * g
                m, v = first[i] / (1 - a ** (step + 1)), second[i] / (1 - b ** (step + 1))
                w -= lr * (decay * w + m / (v.sqrt() + 1e-8))
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_arithmetic_of_the_papers(name: str) -> None:
    module, optimizer = build(CONFIGS[name])
    allocate_state(optimizer)
    train(module, optimizer, range(4))
    for parameter, expected in zip(module.parameters(), longhand(CONFIGS[name], 4), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CONFIGS)
def test_allocated_state_has_the_tensors_of_the_first_step_and_changes_no_number(name: str) -> None:
    module, optimizer = build(CONFIGS[name])
    allocate_state(optimizer)
    allocated = {p: set(optimizer.state[p]) for p in module.parameters()}
    fresh_module, fresh = build(CONFIGS[name])
    train(module, optimizer, range(3))
    train(fresh_module, fresh, range(3))
    for parameter, other in zip(module.parameters(), fresh_module.parameters(), strict=True):
        assert torch.equal(parameter, other)
        # Without momentum torch writes down that there is none.
        kept = {key for key, value in fresh.state[other].items() if value is not None}
        assert allocated[parameter] == kept
        assert kept - {"step"} == set(state_keys(fresh))
        assert all(fresh.state[other][key].shape == other.shape for key in state_keys(fresh))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_tensors_and_step_count_are_all_that_going_on_needs(name: str) -> None:
    module, optimizer = build(CONFIGS[name])
    allocate_state(optimizer)
    train(module, optimizer, range(3))
    again, restored = build(CONFIGS[name])
    allocate_state(restored)
    again.load_state_dict(module.state_dict())
    for parameter, other in zip(module.parameters(), again.parameters(), strict=True):
        for key in state_keys(optimizer):
            restored.state[other][key].copy_(optimizer.state[parameter][key])
    set_steps_taken(restored, steps_taken(optimizer))
    train(module, optimizer, range(3, 5))
    train(again, restored, range(3, 5))
    for parameter, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_steps_are_counted_where_the_arithmetic_needs_them() -> None:
    for name, expected in (("adamw", 3), ("sgd", 0)):
        module, optimizer = build(CONFIGS[name])
        assert steps_taken(optimizer) == 0
        allocate_state(optimizer)
        assert steps_taken(optimizer) == 0
        train(module, optimizer, range(3))
        assert steps_taken(optimizer) == expected


def test_learning_rate_is_set_in_all_groups_and_every_parameter_is_in_one() -> None:
    module, optimizer = build(CONFIGS["sgd"])
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]
    listed = list(parameters_of(optimizer))
    assert len(listed) == len(set(listed))
    assert set(listed) == set(module.parameters())
