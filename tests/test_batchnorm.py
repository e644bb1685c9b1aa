"""Batch norm over all ranks against torch's on the whole batch in one process, in float64.

Legend: N images of a rank, B of all, C channels, D width of the embedding.
"""

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from trainer.backbone import Backbone, build_backbone
from trainer.batchnorm import use_global_statistics
from trainer.collectives import sum_over
from trainer.config import BackboneConfig
from trainer.distributed import World

NUM_RANKS = [1, 2, 3]
BATCH = 12  # divisible by every number of ranks
CHANNELS = 5
NUM_STEPS = 3

LAYERS = {
    "vectors": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS)),
    "sequences": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS, 7)),
    "images": (lambda: nn.BatchNorm2d(CHANNELS, momentum=0.3, eps=1e-3), (BATCH, CHANNELS, 4, 3)),
    "cumulative average": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (BATCH, CHANNELS, 4, 3)),
    "without weight and bias": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (BATCH, CHANNELS, 4, 3)),
    "with activation": (lambda: BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), (BATCH, CHANNELS, 4, 3)),
}
NETWORKS = ["test_efficientnet", "mobilenetv3_small_050"]  # BatchNormAct2d throughout, with and without SE


def layer_of(name: str) -> nn.Module:
    layer = LAYERS[name][0]()
    generator = torch.Generator().manual_seed(7)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def batch_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Return a batch whose ranks have very different means, and the gradient of its output."""
    shape = LAYERS[name][1]
    generator = torch.Generator().manual_seed(step)
    offset = torch.arange(BATCH, dtype=torch.float32).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) + offset, torch.randn(shape, generator=generator)


def images_of(network: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(network))
    contrast = torch.linspace(20, 255, BATCH).view(-1, 1, 1, 1)
    return (torch.rand(BATCH, 3, 32, 32, generator=generator) * contrast).to(torch.uint8)


def backbone_of(network: str, world: World, batch_norm: str) -> Backbone:
    torch.manual_seed(3)
    config = BackboneConfig(
        name=network, image_size=32, neck="bn_linear_bn", embedding_dim=8, batch_norm=batch_norm
    )
    return build_backbone(config, world.group)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def train_layer(layer: nn.Module, name: str, world: World, dtype: torch.dtype) -> dict[str, Any]:
    """Run NUM_STEPS steps on this rank's part, then one batch in evaluation."""
    result: dict[str, Any] = {}
    for step in range(NUM_STEPS):
        x_N, grad_N = (part.chunk(world.size)[world.rank].to(dtype) for part in batch_of(name, step))
        x_N.requires_grad_()
        before = x_N.detach().clone()
        y_N = layer(x_N)
        y_N.backward(grad_N)
        assert torch.equal(x_N, before)
        result[f"output {step}"], result[f"input gradient {step}"] = y_N.detach(), x_N.grad
    for key, parameter in layer.named_parameters():
        result[f"gradient of {key}"] = sum_over(parameter.grad, world.group)
    result |= {f"state {key}": value for key, value in state_of(layer).items()}
    layer.eval()
    result["evaluation"] = layer(batch_of(name, 9)[0].chunk(world.size)[world.rank].to(dtype)).detach()
    return result


def train_network(backbone: Backbone, network: str, world: World) -> dict[str, Any]:
    images_N = images_of(network).chunk(world.size)[world.rank]
    embeddings_ND = backbone(images_N)
    generator = torch.Generator().manual_seed(5)
    embeddings_ND.backward(
        torch.randn(BATCH, 8, generator=generator).chunk(world.size)[world.rank].to(embeddings_ND.dtype)
    )
    gradient = torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()])
    running = [value for key, value in state_of(backbone).items() if "running" in key]
    backbone.eval()
    with torch.no_grad():
        evaluation_ND = backbone(images_N)
    return {
        "output": embeddings_ND.detach(),
        "gradient": sum_over(gradient, world.group),
        "state": torch.cat(running),
        "evaluation": evaluation_ND,
    }


def on_a_rank(world: World) -> dict[str, dict[str, Any]]:
    results = {}
    for name in LAYERS:
        layer = nn.Sequential(layer_of(name))
        names = list(layer.state_dict())
        use_global_statistics(layer, world.group, activated=BatchNormAct2d)
        assert list(layer.state_dict()) == names
        assert (type(layer[0]) is type(layer_of(name))) == (world.size == 1)
        results[name] = train_layer(layer[0], name, world, torch.float32)
    for network in NETWORKS:
        backbone = backbone_of(network, world, "global")
        assert list(backbone.state_dict()) == list(backbone_of(network, world, "local").state_dict())
        results[network] = train_network(backbone, network, world)
    results["local"] = train_network(backbone_of(NETWORKS[0], world, "local"), NETWORKS[0], world)
    results["half"] = in_half_precision(world)
    return results


def in_half_precision(world: World) -> dict[str, Any]:
    """Run a float32 layer on bfloat16 input, as under autocast, and on the same numbers in float32."""
    x_N = batch_of("images", 0)[0].chunk(world.size)[world.rank].bfloat16()
    layer, exact = nn.Sequential(layer_of("images")), nn.Sequential(layer_of("images"))
    for module in (layer, exact):
        use_global_statistics(module, world.group, activated=BatchNormAct2d)
    return {
        "output": layer(x_N).detach(),
        "exact": exact(x_N.float()).detach(),
        "state": state_of(layer),
        "exact state": state_of(exact),
    }


def in_one_process(world: World) -> dict[str, dict[str, Any]]:
    """Plain torch and timm on the whole batch in float64, and the networks in float32 as well."""
    results = {name: train_layer(layer_of(name).double(), name, world, torch.float64) for name in LAYERS}
    for network in NETWORKS:
        results[network] = train_network(backbone_of(network, world, "local").double(), network, world)
        results[f"{network} float32"] = train_network(backbone_of(network, world, "local"), network, world)
    return results


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Any]]:
    return run_on_ranks(in_one_process, 1)[0]


def whole(key: str, parts: list[Tensor]) -> Tensor:
    """Join rows of the ranks; what all ranks must agree on is taken once, after a check."""
    if key.startswith(("output", "input", "evaluation")):
        return torch.cat(parts).double()
    assert all(torch.equal(part, parts[0]) for part in parts), key
    return parts[0].double()


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: run_on_ranks(on_a_rank, num_ranks) for num_ranks in NUM_RANKS}


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_one_process_on_the_whole_batch(
    name: str, num_ranks: int, results: dict[int, list[dict[str, Any]]], reference: dict[str, dict[str, Any]]
) -> None:
    """Outputs, gradients of input, weight and bias, running statistics, evaluation."""
    assert results[num_ranks][0][name].keys() == reference[name].keys()
    for key, expected in reference[name].items():
        found = whole(key, [result[name][key] for result in results[num_ranks]])
        assert found.shape == expected.shape
        # Means of up to 12 on spreads of 1: float32 keeps about 1e-6 of them.
        assert error_of(found, expected) < 5e-6, key


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_that_of_one_process_on_the_whole_batch(
    network: str,
    num_ranks: int,
    results: dict[int, list[dict[str, Any]]],
    reference: dict[str, dict[str, Any]],
) -> None:
    for key, expected in reference[network].items():
        found = whole(key, [result[network][key] for result in results[num_ranks]])
        floor = error_of(reference[f"{network} float32"][key].double(), expected)
        # Sums in another order than one process in float32 makes them, no more.
        assert error_of(found, expected) < 3 * floor + 1e-6, (key, floor)


def test_statistics_of_each_rank_alone_make_another_network(
    results: dict[int, list[dict[str, Any]]], reference: dict[str, dict[str, Any]]
) -> None:
    found = torch.cat([result["local"]["output"] for result in results[2]])
    assert error_of(found, reference[NETWORKS[0]]["output"]) > 0.05


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_half_precision_is_normalised_in_float32_and_rounded_once(
    num_ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    for half in (result["half"] for result in results[num_ranks]):
        assert half["output"].dtype == torch.bfloat16
        assert torch.equal(half["output"], half["exact"].bfloat16())
        for name, value in half["state"].items():
            assert value.dtype == half["exact state"][name].dtype
            assert torch.equal(value, half["exact state"][name])
