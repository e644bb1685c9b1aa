"""From a name to a network that maps uint8 images to embeddings: timm, and a neck of our own.

Legend: N images, C channels, H x W pixels, F width of the pooled output, D width of the embedding.
"""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import register_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.func import functional_call

from trainer.batchnorm import use_global_statistics
from trainer.config import BackboneConfig
from trainer.errors import UserError
from trainer.networks import INPUTS, CifarNet, LeNetPP, PreActResNet


@register_model
def lenetpp(pretrained: bool = False, **kwargs: int) -> LeNetPP:
    """Build LeNet++ by ``timm.create_model("lenetpp")``. Raises ValueError for what it does not have."""
    return LeNetPP(**_known(pretrained, kwargs, "in_chans", "img_size"))


@register_model
def lenetspp(pretrained: bool = False, **kwargs: int) -> LeNetPP:
    """Build the LeNets++ of center loss. Raises ValueError for what it does not have."""
    return LeNetPP(**_known(pretrained, kwargs, "in_chans", "img_size"), last_pool=2)


@register_model
def preact_resnet(pretrained: bool = False, **kwargs: int) -> PreActResNet:
    """Build the network of the standalone center loss. Raises ValueError for what it does not have."""
    return PreActResNet(**_known(pretrained, kwargs, "in_chans"))


@register_model
def cifarnet(pretrained: bool = False, **kwargs: int) -> CifarNet:
    """Build the network of the CIFAR-10 speed records. Raises ValueError for what it does not have."""
    return CifarNet(**_known(pretrained, kwargs, "in_chans"))


@register_model
def cifarnet_wide(pretrained: bool = False, **kwargs: int) -> CifarNet:
    """Build the same in 128, 384 and 384 channels. Raises ValueError for what it does not have."""
    return CifarNet(**_known(pretrained, kwargs, "in_chans"), widths=(128, 384, 384))


def _known(pretrained: bool, options: dict[str, int], *names: str) -> dict[str, Any]:
    """Return the options of these names; timm passes more to every model."""
    if pretrained or "drop_path_rate" in options:
        raise ValueError("there are neither published weights nor stochastic depth")
    return {key: value for key, value in options.items() if key in names}


class Backbone(nn.Module):
    """Pixels 0..255 -> normalised pixels -> timm network -> neck -> embeddings."""

    mean_C11: Tensor
    std_C11: Tensor

    memory_format = torch.contiguous_format
    """How pixels lie in memory when they enter the network; convolutions keep it to the end."""

    def __init__(
        self, network: nn.Module, neck: nn.Module, dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network, self.neck, self.dim = network, neck, dim
        self.register_buffer("mean_C11", 255.0 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", 255.0 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x D embeddings of N x C x H x W uint8 images."""
        dtype = next(self.network.parameters()).dtype
        # Images arrive as decoders write them, channels last: the conversion turns them on the device.
        floats_NCHW = images_NCHW.to(torch.float32, memory_format=self.memory_format)
        x_NCHW = ((floats_NCHW - self.mean_C11.float()) / self.std_C11.float()).to(dtype)
        return self.neck(self._features(x_NCHW))

    def _features(self, x_NCHW: Tensor) -> Tensor:
        """Run the network; channels last, the weights of convolutions are turned once before it trains.

        Every pass would turn them else. They can't be kept so: the engine holds parameters as views of flat
        buffers.
        """
        if not self.training or self.memory_format is torch.contiguous_format:
            return self.network(x_NCHW)
        named = self.network.named_parameters()
        weights = {name: w.contiguous(memory_format=self.memory_format) for name, w in named if w.ndim == 4}
        return functional_call(self.network, weights, x_NCHW)


def build_backbone(config: BackboneConfig, group: ProcessGroup | None) -> Backbone:
    """Build the network that the configuration names; communicates only while training (batch norm).

    Without a group every batch norm is local. Raises UserError for what timm does not know or cannot do.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"backbone.name: timm has no model {config.name!r}{hint}")
    defaults = input_defaults(config.name)
    options: dict = {"in_chans": config.channels, "num_classes": 0}
    if config.image_size is not None and defaults.get("fixed_input_size", False):
        options["img_size"] = config.image_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        network: Any = timm.create_model(config.name, pretrained=config.pretrained, **options)
        if config.gradient_checkpointing:
            network.set_grad_checkpointing(True)
        width = _pooled_width(network, config.channels, image_size_of(config))
    except UserError:
        raise
    except Exception as error:  # timm and the hub raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"backbone: cannot build {config.name!r} as configured: {reason}") from error
    mean = _per_channel(config.mean or defaults.get("mean", (0.5,)), config.channels)
    std = _per_channel(config.std or defaults.get("std", (0.5,)), config.channels)
    backbone = Backbone(network, _build_neck(config, width), config.embedding_dim or width, mean, std)
    if config.channels_last:
        backbone.memory_format = torch.channels_last
    if config.batch_norm == "global" and group is not None:
        use_global_statistics(backbone, group, activated=BatchNormAct2d)
    return backbone


@torch.no_grad()
def _pooled_width(network: nn.Module, channels: int, image_size: int) -> int:
    """Return F, by looking at one empty image: an image size that does not fit is met now, not in step 1."""
    network.eval()
    width = network(torch.zeros(1, channels, image_size, image_size)).shape[-1]
    network.train()
    return int(width)


def input_defaults(name: str) -> dict:
    """Return what timm says about a model's input: ``input_size`` (C, H, W), ``mean``, ``std``.

    Raises UserError for a tag (what follows the dot) that timm does not know.
    """
    if name in INPUTS:
        return dict(INPUTS[name])
    try:
        pretrained = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"backbone.name: {error}") from error
    return pretrained.to_dict() if pretrained is not None else {}


def image_size_of(config: BackboneConfig) -> int:
    """Return the side of the square input in pixels. Raises UserError if neither config nor timm knows."""
    size = config.image_size or input_defaults(config.name).get("input_size", (0, 0, 0))[-1]
    if not size:
        raise UserError(f"backbone.image_size: timm gives none for {config.name!r}; name it")
    return int(size)


def _build_neck(config: BackboneConfig, width: int) -> nn.Module:
    """Build the layers between the pooled output (F = ``width``) and the embedding (D)."""
    if config.neck == "none":
        if config.embedding_dim not in (None, width):
            raise UserError(
                f"backbone.embedding_dim: is {config.embedding_dim}, but {config.name} without a neck "
                f"gives {width}"
            )
        return nn.Identity()
    dim = config.embedding_dim or width
    linear = nn.Linear(width, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    layers: list[nn.Module] = [nn.Dropout(config.dropout), linear]
    if config.neck == "linear_prelu":
        layers.append(nn.PReLU(dim))
    if config.neck in ("bn_linear", "bn_linear_bn"):
        layers.insert(0, nn.BatchNorm1d(width))
    if config.neck == "bn_linear_bn":
        layers.append(nn.BatchNorm1d(dim))
    return nn.Sequential(*layers)


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """Repeat one value per channel, or average three for a grey image."""
    if len(values) == channels:
        return values
    return [sum(values) / len(values)] * channels


def with_classifier(network: nn.Module, weight_DF: Tensor, bias_D: Tensor) -> nn.Module:
    """Return a copy of a timm model with this linear layer for a classifier. Raises UserError without one."""
    model: Any = copy.deepcopy(network)
    model.reset_classifier(len(bias_D))
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != weight_DF.shape:
        raise UserError(
            f"backbone.name: timm's {type(model).__name__} does not end in one linear layer that could hold "
            "the neck; export another format"
        )
    with torch.no_grad():
        classifier.weight.copy_(weight_DF)
        classifier.bias.copy_(bias_D)
    return model.eval()


def is_from_timm(name: str) -> bool:
    """Say whether timm alone has the model, rather than ``trainer/networks.py``."""
    return timm.models.model_entrypoint(name).__module__.startswith("timm.")


def save_timm(model: nn.Module, folder: Path, config: BackboneConfig, backbone: Backbone) -> None:
    """Write ``model.safetensors`` and ``config.json``, which ``timm.create_model("local-dir:...")`` reads.

    Its ``pretrained_cfg`` holds our preprocessing: shorter side to the image size, then the central square.
    """
    size = image_size_of(config)
    preprocessing = {
        "input_size": (config.channels, size, size),
        "mean": tuple((backbone.mean_C11 / 255).flatten().tolist()),
        "std": tuple((backbone.std_C11 / 255).flatten().tolist()),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    of_these_weights = {"tag": "", "license": "other", "origin_url": None}  # not those of timm's weights
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": of_these_weights},
        safe_serialization=True,
        data_config=preprocessing,
    )


def load_timm(folder: Path) -> Any:
    """Load what ``save_timm`` wrote as a user without this project would."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def open_timm(folder: Path) -> tuple[Backbone, int, int]:
    """Open a folder of timm's files as pixels 0..255 to embeddings; return image side and channels as well.

    Raises UserError for what timm cannot load, and for preprocessing that is not ours.
    """
    try:
        network = load_timm(folder)
    except Exception as error:  # timm raises whatever it likes
        raise UserError(f"{folder}: timm cannot load it: {' '.join(str(error).split())}") from None
    data = timm.data.resolve_model_data_config(network)
    channels, height, width = data["input_size"]
    if height != width or data["crop_pct"] != 1:
        raise UserError(
            f"{folder / 'config.json'}: input is {height} x {width} and crop_pct {data['crop_pct']}, not a "
            "square and 1.0: images here are scaled to the input's side and cropped in the centre"
        )
    dim = network.num_classes or network.num_features
    return Backbone(network, nn.Identity(), dim, data["mean"], data["std"]), height, channels
