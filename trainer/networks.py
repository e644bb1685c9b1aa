"""Networks of the papers that timm does not have; ``trainer/backbone.py`` registers them there."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class LeNetPP(nn.Module):
    """LeNet++ of the COCO and center loss demonstrations: three times two 5x5 convolutions with PReLU.

    Widths 32, 64, 128, each pair followed by max pooling, the last with kernel 3 and stride 2 (rounded up,
    as in Caffe: 7 -> 3). Without its last linear layer, which is the neck: the output is flat, 128 x 3 x 3
    for 28 x 28 pixels. Source: script_mnist prototxts of the COCO loss' authors.
    """

    def __init__(self, in_chans: int = 1, img_size: int = 28) -> None:
        super().__init__()
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
        self.activations = nn.ModuleList(nn.PReLU(width) for width in widths[1:] for _ in range(2))
        side = ((img_size // 2 // 2 - 3) + 1) // 2 + 1
        self.num_features = self.head_hidden_size = 128 * side * side

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x num_features."""
        x = images_NCHW
        for i, (convolution, activation) in enumerate(zip(self.convolutions, self.activations, strict=True)):
            x = activation(convolution(x))
            if i % 2:
                x = F.max_pool2d(x, 2) if i < 5 else F.max_pool2d(x, 3, 2, ceil_mode=True)
        return x.flatten(1)


LENETPP_INPUT = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "fixed_input_size": True}
"""What timm calls the default configuration of a model."""
