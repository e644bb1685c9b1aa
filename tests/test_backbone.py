"""Backbones by name, from pixels to embeddings, in one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.backbone import Backbone, build_backbone, image_size_of
from trainer.config import BackboneConfig
from trainer.errors import UserError
from trainer.networks import PReLU


@pytest.fixture(scope="module")
def group() -> Iterator[ProcessGroup]:
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def config_of(**fields: Any) -> BackboneConfig:
    return BackboneConfig(
        **{"name": "lenetpp", "channels": 1, "neck": "none", "embedding_dim": None, **fields}
    )


def pixels(channels: int, side: int, num_images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_images, channels, side, side), generator=generator, dtype=torch.uint8)


def num_parameters(module: nn.Module, kind: type[nn.Module] = nn.Module) -> int:
    modules = [m for m in module.modules() if isinstance(m, kind)] if kind is not nn.Module else [module]
    return sum(parameter.numel() for m in modules for parameter in m.parameters())


def test_lenetpp_has_the_shapes_and_the_parameter_count_of_its_authors(group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(neck="linear", embedding_dim=3), group)
    assert backbone.network(torch.zeros(2, 1, 28, 28)).shape == (2, 1152)
    assert backbone(pixels(1, 28)).shape == (2, 3)
    slopes = num_parameters(backbone, nn.PReLU)
    assert slopes == 2 * (32 + 64 + 128)
    assert num_parameters(backbone) == 798_307 + slopes  # convolutions and FC 3, with their biases
    assert all((m.weight == 0.25).all() for m in backbone.modules() if isinstance(m, nn.PReLU))


@pytest.mark.parametrize(("side", "last"), [(28, 3), (32, 4), (36, 4), (40, 5), (56, 7)])
def test_lenetpp_takes_other_sizes(side: int, last: int, group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(image_size=side), group)
    assert backbone.dim == 128 * last**2
    assert backbone(pixels(1, side)).shape == (2, backbone.dim)


@pytest.mark.parametrize(
    ("name", "channels", "side", "width", "parameters"),
    [
        ("lenetspp", 1, 28, 1152, 798_307 - 3 * 1153 + 2 * (32 + 64 + 128)),  # less FC 3, with PReLU's slopes
        ("preact_resnet", 1, 28, 128, 160 + 14_528 + 19_680 + 57_728 + 78_272 + 230_144 + 256),
        ("cifarnet", 3, 32, 256, 24 + 9 * (24 * 64 + 64**2 + 64 * 256 + 3 * 256**2) + 4 * (64 + 2 * 256)),
        ("cifarnet_wide", 3, 32, 384, 24 + 9 * (24 * 128 + 128**2 + 128 * 384 + 3 * 384**2) + 4 * 896),
    ],
)
def test_networks_of_the_papers_have_their_widths_and_parameters(
    name: str, channels: int, side: int, width: int, parameters: int, group: ProcessGroup
) -> None:
    backbone = build_backbone(config_of(name=name, channels=channels), group)
    assert backbone(pixels(channels, side)).shape == (2, width)
    assert num_parameters(backbone) == parameters


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_our_prelu_has_the_value_and_the_gradients_of_its_formula(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x[0, 0] = 0  # torch gives what is not above zero the slope of the negative side
    if x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    x.requires_grad_()
    prelu = PReLU(3, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.25, -0.5, 1.5]))  # exact in bfloat16
    y = prelu(x)
    assert "OnCPU" in type(y.grad_fn).__name__
    y.backward(upstream)

    x64, weight, up = x.detach().double(), prelu.weight.detach().double(), upstream.double()
    weight = weight.view(1, 3, *[1] * (x.ndim - 2)).expand_as(x64)
    slope = torch.where(x64 > 0, 1.0, weight)
    by_channel = torch.where(x64 > 0, 0.0, x64 * up).transpose(0, 1).flatten(1).sum(1)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    close = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close(y.double(), x64 * slope, **close)
    torch.testing.assert_close(x.grad.double(), up * slope, **close)
    torch.testing.assert_close(prelu.weight.grad.double(), by_channel, **close)


def test_cifarnet_whitens_what_natural_images_have_in_common(group: ProcessGroup) -> None:
    """Smooth, mostly grey noise: its patches' luminance, 20 times their finest contrast, comes out alike."""
    images = torch.nn.functional.interpolate(
        torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), scale_factor=4, mode="bicubic"
    )
    filters = build_backbone(config_of(name="cifarnet", channels=1), group).network.whitening
    torch.testing.assert_close(filters[:4], -filters[4:])
    responses_CM = torch.nn.functional.conv2d(images, filters[:4]).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(responses_CM)
    assert (correlation - torch.eye(4)).abs().max() < 0.05
    patches_CM = torch.nn.functional.unfold(images, 2).transpose(0, 1).flatten(1)
    spread, white = torch.linalg.eigvalsh(torch.cov(patches_CM)), torch.linalg.eigvalsh(correlation)
    assert spread.max() / spread.min() > 200
    assert white.max() / white.min() < 1.2


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_reaches_the_convolutions_and_changes_no_embedding(
    channels: int, group: ProcessGroup
) -> None:
    plain, last = (
        build_backbone(config_of(name="preact_resnet", channels=channels, channels_last=on), group).eval()
        for on in (False, True)
    )
    last.load_state_dict(plain.state_dict())
    seen: list[bool] = []
    last.network.blocks[-1].register_forward_hook(
        lambda _module, _inputs, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    images = pixels(channels, 28)
    torch.testing.assert_close(last(images), plain(images), rtol=1e-5, atol=1e-6)
    assert seen == [True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_weights_are_channels_last_too_and_change_no_gradient(
    checkpointing: bool, group: ProcessGroup
) -> None:
    options = {"channels": 3, "image_size": 32, "gradient_checkpointing": checkpointing}
    plain, last = (
        build_backbone(config_of(name="resnet18", **options, channels_last=on), group).double()
        for on in (False, True)
    )
    last.load_state_dict(plain.state_dict())
    seen: list[bool] = []
    last.network.layer1[0].conv1.register_forward_pre_hook(
        lambda module, _inputs: seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    for backbone in (plain, last):
        backbone(pixels(3, 32)).square().sum().backward()
    assert seen[0]
    for (name, a), b in zip(plain.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert b.is_contiguous(), "what the engine flattens keeps its own layout"


def test_a_linear_prelu_neck_ends_in_a_slope_per_dimension(group: ProcessGroup) -> None:
    neck = build_backbone(config_of(neck="linear_prelu", embedding_dim=3), group).neck
    assert [type(layer).__name__ for layer in neck] == ["Dropout", "Linear", "PReLU"]
    assert neck[2].weight.shape == (3,)


@pytest.mark.parametrize(
    ("name", "channels", "image_size", "dim"),
    [
        ("test_resnet", 3, 32, 96),
        ("test_vit", 1, 32, 64),  # made for 160 pixels: position embeddings are of the size asked for
        ("mobilenetv3_small_050", 1, 32, 1024),  # the pooled output is wider than the last feature map
        ("test_vit.r160_in1k", 3, None, 64),
    ],
)
def test_timm_models_give_embeddings_of_the_announced_width(
    name: str, channels: int, image_size: int | None, dim: int, group: ProcessGroup
) -> None:
    config = config_of(name=name, channels=channels, image_size=image_size)
    backbone = build_backbone(config, group)
    side = image_size_of(config)
    assert side == (image_size or 160)
    assert backbone.dim == dim
    assert backbone(pixels(channels, side)).shape == (2, dim)


def test_vit_of_another_image_size_has_its_positions(group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(name="test_vit", image_size=48), group)
    assert backbone.network.pos_embed.shape[1] == (48 // 16) ** 2 + 1


def test_pixels_are_normalised_as_torchvision_does(group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(name="test_resnet", channels=3, image_size=32), group)
    backbone.network = nn.Identity()
    backbone.network.register_parameter("some", nn.Parameter(torch.zeros(1)))
    images_NCHW = pixels(3, 32)
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0, 0.5, 1.0), (1.0, 1.0, 2.0))):
        whole = Backbone(backbone.network, nn.Identity(), 3, mean, std)
        expected = torch.stack(
            [(images_NCHW[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1
        )
        torch.testing.assert_close(whole(images_NCHW).double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_and_std_are_the_models_own_unless_configured(group: ProcessGroup) -> None:
    def of(**fields: Any) -> tuple[list[float], list[float]]:
        backbone = build_backbone(config_of(**{"name": "resnet18", "channels": 3, **fields}), group)
        return tuple((x.flatten() / 255).tolist() for x in (backbone.mean_C11, backbone.std_C11))

    mean, std = timm.get_pretrained_cfg("resnet18").mean, timm.get_pretrained_cfg("resnet18").std
    assert of() == (pytest.approx(mean), pytest.approx(std))
    # Grey images: the mean of the three.
    assert of(channels=1) == (pytest.approx([sum(mean) / 3]), pytest.approx([sum(std) / 3]))
    assert of(mean=(0.25,), std=(0.5,)) == (pytest.approx([0.25] * 3), pytest.approx([0.5] * 3))
    assert of(mean=(0.1, 0.2, 0.3))[0] == pytest.approx([0.1, 0.2, 0.3])
    assert of(name="lenetpp", channels=1) == ([0.5], [0.5])


def test_checkpoints_hold_no_pixel_constants(group: ProcessGroup) -> None:
    assert not [key for key in build_backbone(config_of(), group).state_dict() if "C11" in key]


def test_gradient_checkpointing_changes_no_gradient(group: ProcessGroup) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = config_of(name="test_vit", image_size=32, gradient_checkpointing=recompute)
        backbone = build_backbone(config, group)
        assert backbone.network.grad_checkpointing == recompute
        backbone(pixels(1, 32)).square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_drop_path_reaches_the_model(group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(name="test_vit", image_size=32, drop_path=0.3), group)
    assert max(getattr(m, "drop_prob", 0.0) for m in backbone.modules()) == pytest.approx(0.3)


def test_unknown_names_are_refused_with_the_nearest_known(group: ProcessGroup) -> None:
    with pytest.raises(
        UserError, match=r"^backbone.name: timm has no model 'resnet81'; did you mean resnet\d"
    ):
        build_backbone(config_of(name="resnet81"), group)
    with pytest.raises(UserError, match=r"^backbone.name: timm has no model 'lenetp'; did you mean lenetpp"):
        build_backbone(config_of(name="lenetp"), group)
    with pytest.raises(UserError, match=r"^backbone.name: timm has no model '#+'$"):
        build_backbone(config_of(name="#####"), group)
    with pytest.raises(
        UserError, match=r"^backbone.name: Invalid pretrained tag \(no_such_tag\) for test_vit"
    ):
        build_backbone(config_of(name="test_vit.no_such_tag"), group)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gradient_checkpointing": True}, "set_grad_checkpointing"),
        ({"drop_path": 0.1}, "stochastic depth"),
        ({"pretrained": True}, "published weights"),
        ({"name": "vgg11", "channels": 3, "gradient_checkpointing": True}, "not supported"),
    ],
)
def test_what_a_network_cannot_do_is_refused_in_one_line(
    fields: dict[str, Any], reason: str, group: ProcessGroup
) -> None:
    with pytest.raises(UserError, match=f"^backbone: cannot build '.*' as configured: .*{reason}") as caught:
        build_backbone(config_of(**fields), group)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("neck", "kinds"),
    [
        ("linear", [nn.Dropout, nn.Linear]),
        ("bn_linear", [nn.BatchNorm1d, nn.Dropout, nn.Linear]),
        ("bn_linear_bn", [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.BatchNorm1d]),
    ],
)
@pytest.mark.parametrize("dim", [8, None])
def test_necks_are_what_their_names_say(
    neck: str, kinds: list[type], dim: int | None, group: ProcessGroup
) -> None:
    backbone = build_backbone(config_of(name="test_vit", neck=neck, embedding_dim=dim, image_size=32), group)
    assert [type(layer) for layer in backbone.neck] == kinds
    assert backbone.dim == (dim or 64)
    assert backbone(pixels(1, 32)).shape == (2, dim or 64)
    linear = next(layer for layer in backbone.neck if isinstance(layer, nn.Linear))
    assert not linear.bias.any()


def test_dropout_is_the_configured_one_and_off_in_evaluation(group: ProcessGroup) -> None:
    backbone = build_backbone(config_of(neck="linear", embedding_dim=8, dropout=0.5), group)
    assert backbone.neck[0].p == 0.5
    assert not torch.equal(backbone(pixels(1, 28)), backbone(pixels(1, 28)))
    backbone.eval()
    assert torch.equal(backbone(pixels(1, 28)), backbone(pixels(1, 28)))


def test_without_a_neck_the_width_is_the_networks(group: ProcessGroup) -> None:
    assert build_backbone(config_of(name="test_vit", image_size=32, embedding_dim=64), group).dim == 64
    with pytest.raises(
        UserError, match=r"^backbone.embedding_dim: is 512, but test_vit without a neck gives 64"
    ):
        build_backbone(config_of(name="test_vit", image_size=32, embedding_dim=512), group)


def test_image_size_is_asked_for_where_timm_has_none() -> None:
    with pytest.raises(UserError, match=r"^backbone.image_size: timm gives none for 'no_such_model'"):
        image_size_of(config_of(name="no_such_model"))
    assert image_size_of(config_of(name="no_such_model", image_size=64)) == 64
    assert image_size_of(config_of()) == 28
