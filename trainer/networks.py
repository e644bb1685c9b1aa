"""Networks of the papers that timm does not have; ``trainer/backbone.py`` registers them there."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class LeNetPP(nn.Module):
    """LeNet++ of the COCO and center loss demonstrations: three times two 5x5 convolutions with PReLU.

    Widths 32, 64, 128, each pair followed by max pooling, the last with kernel 3 and stride 2 (rounded up,
    as in Caffe: 7 -> 3). Without its last linear layer, which is the neck: the output is flat, 128 x 3 x 3
    for 28 x 28 pixels. Source: script_mnist prototxts of the COCO loss' authors. ``last_pool`` = 2 is the
    LeNets++ of Wen et al. (ECCV 2016, table 1), rounded down.
    """

    def __init__(self, in_chans: int = 1, img_size: int = 28, last_pool: int = 3) -> None:
        super().__init__()
        self.last_pool = last_pool
        widths = (in_chans, 32, 64, 128)
        convolutions = [
            nn.Conv2d(before if first else width, width, 5, padding=2)
            for before, width in pairwise(widths)
            for first in (True, False)
        ]
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.convolutions = nn.ModuleList(convolutions)
        self.activations = nn.ModuleList(PReLU(width) for width in widths[1:] for _ in range(2))
        side = ((img_size // 2 // 2 - 3) + 1) // 2 + 1 if last_pool == 3 else img_size // 8
        self.num_features = self.head_hidden_size = 128 * side * side

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x num_features."""
        x = images_NCHW
        for i, (convolution, activation) in enumerate(zip(self.convolutions, self.activations, strict=True)):
            x = activation(convolution(x))
            if i % 2:
                last = i == 5 and self.last_pool == 3
                x = F.max_pool2d(x, 3, 2, ceil_mode=True) if last else F.max_pool2d(x, 2)
        return x.flatten(1)


class PReLU(nn.PReLU):
    """PReLU whose passes take 5 instead of 22 ms on a CPU (docs/decisions.md); elsewhere it is torch's own.

    torch's kernel goes element by element there: a third of a step of LeNet++.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x where it is positive, elsewhere times the weight of its channel (dimension 1)."""
        if self.training and x.device.type == "cpu":
            return _PReLUOnCPU.apply(x, self.weight)
        return super().forward(x)


class _PReLUOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight_C: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_C)
        return F.prelu(x, weight_C.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_C = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(gradient, x, 0)  # where x > 0, else 0
        below = gradient - above
        by_channel_C = (below * x).sum([d for d in range(x.ndim) if d != 1], dtype=weight_C.dtype)
        weight_C11 = weight_C.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        return above.addcmul_(below, weight_C11), by_channel_C


class PreActResNet(nn.Module):
    """Pre-activation ResNet of the standalone center loss: five blocks of two 3x3 convolutions, 128 wide.

    The first convolution has no padding; shortcuts of another shape are 1x1 convolutions of the activated
    input; all convolutions have biases. Source: models of github.com/mo-vic/standalone-center-loss.
    """

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_chans, 16, 3)
        widths, strides = (16, 32, 32, 64, 64, 128), (1, 2, 1, 2, 1)
        steps = zip(pairwise(widths), strides, strict=True)
        self.blocks = nn.Sequential(
            *(_PreActBlock(before, width, stride) for (before, width), stride in steps)
        )
        self.last_norm = nn.BatchNorm2d(128)
        self.num_features = self.head_hidden_size = 128
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x 128."""
        return F.relu(self.last_norm(self.blocks(self.first(images_NCHW)))).mean((2, 3))


class _PreActBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(width)
        self.convolution1 = nn.Conv2d(before, width, 3, stride, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)
        same = before == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        y = self.convolution2(F.relu(self.norm2(self.convolution1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class CifarNet(nn.Module):
    """The network of the present CIFAR-10 speed records: 94 % in 10 epochs, a third of ResNet-9's work each.

    2 x 2 patches are whitened, by filters that are not trained; three times two 3 x 3 convolutions with batch
    norm and GELU, max pooling in each, begin as the identity of their input. Source: airbench94, Jordan, "94%
    on CIFAR-10 in 3.29 seconds on a single GPU" (2024), whose whitening is measured on its images; ours is
    the one that natural images share. Its airbench95 is the same with ``widths`` 128, 384, 384.
    """

    whitening: Tensor

    def __init__(self, in_chans: int = 3, widths: tuple[int, int, int] = (64, 256, 256)) -> None:
        super().__init__()
        filters = _whitening(in_chans)
        self.register_buffer("whitening", filters)
        self.whitening_bias = nn.Parameter(torch.zeros(len(filters)))
        steps = pairwise((len(filters), *widths))
        self.groups = nn.Sequential(*(_PooledPair(before, width) for before, width in steps))
        self.num_features = self.head_hidden_size = widths[-1]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x the last width."""
        x = F.gelu(F.conv2d(images_NCHW, self.whitening, self.whitening_bias))
        return self.groups(x).amax((2, 3))


class _PooledPair(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        for convolution in (self.convolution1, self.convolution2):
            nn.init.dirac_(convolution.weight.data[: convolution.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.convolution1(x), 2)))
        return F.gelu(self.norm2(self.convolution2(x)))


def _whitening(channels: int) -> Tensor:
    """Return 2 x 2 filters whose responses to natural images are about independent; and their negatives.

    The principal components of such patches are sums and differences of their pixels times sums and
    differences of their colours. The deviations that they are divided by are CIFAR-10's in normalised pixels,
    as a product of one by place and one by colour.
    """
    by_place = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
    by_place /= torch.tensor([[3.2], [0.6], [0.6], [0.23]])
    by_colour = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    by_colour /= torch.tensor([[3.0], [2.0], [6.0]]).sqrt() * torch.tensor([[1.0], [0.275], [0.13]])
    if channels == 1:
        by_colour = torch.ones(1, 1)
    filters = torch.kron(by_colour, by_place).view(-1, channels, 2, 2)
    return torch.cat([filters, -filters])


_DIGITS = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}
_CIFAR = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}

INPUTS: dict[str, dict[str, Any]] = {
    "lenetpp": {**_DIGITS, "fixed_input_size": True},
    "lenetspp": {**_DIGITS, "fixed_input_size": True},
    "preact_resnet": {**_CIFAR, "mean": (0.0,) * 3, "std": (1.0,) * 3},  # its authors only scale to 0..1
    "cifarnet": _CIFAR,
    "cifarnet_wide": _CIFAR,
}
"""Name -> what timm calls the default configuration of a model."""
