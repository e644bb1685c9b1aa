"""From a decoded image to the uint8 tensor that is sent to the device.

Pixels stay uint8 until they are there (a quarter of the traffic); the backbone normalises them. What is
random draws from the generators of the process, which ``seed_generators`` sets for every sample. Shapes:
C channels, H height, W width.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

MAX_RATIO = 64  # of the sides of what is resized: an image of 1 x 20 000 would become 3 GB at size 224
Transform = Callable[[Tensor], Tensor]
"""From one uint8 CHW image to another."""


def build_train_transform(
    *,
    image_size: int,
    crop_scale: tuple[float, float] | None = None,
    flip_probability: float = 0.0,
    rotate_degrees: float = 0.0,
    shift_fraction: float = 0.0,
    scale_range: tuple[float, float] | None = None,
    color_jitter: float = 0.0,
    erase_probability: float = 0.0,
    rand_augment: int = 0,
    low_resolution_probability: float = 0.0,
    occlusion_probability: float = 0.0,
) -> Transform:
    """Return the random transform of training; a stage whose parameter is neutral is left out."""
    stages: list[Transform] = []
    if crop_scale is None:
        stages.append(_Square(image_size))
    else:
        stages.append(v2.RandomResizedCrop(image_size, scale=crop_scale, antialias=True))
    if flip_probability > 0:
        stages.append(_RandomFlip(flip_probability))
    if rotate_degrees > 0 or shift_fraction > 0 or scale_range not in (None, (1.0, 1.0)):
        stages.append(_RandomAffine(rotate_degrees, shift_fraction, scale_range or (1.0, 1.0)))
    if color_jitter > 0:
        stages.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if rand_augment > 0:
        stages.append(v2.RandAugment(num_ops=2, magnitude=rand_augment, num_magnitude_bins=31))
    if low_resolution_probability > 0:
        stages.append(_RandomLowResolution(low_resolution_probability))
    if occlusion_probability > 0:
        stages.append(_RandomOcclusion(occlusion_probability))
    if erase_probability > 0:
        stages.append(v2.RandomErasing(erase_probability))
    return _Chain(stages)


def build_eval_transform(*, image_size: int) -> Transform:
    """Return the fixed transform of evaluation: shorter side to ``image_size``, then the central square."""
    return _Square(image_size)


def seed_generators(key: int) -> None:
    """Make the next draws of torch, random and numpy a function of a 64-bit ``key`` alone."""
    torch.default_generator.manual_seed(key)  # torch.manual_seed visits every device too: 10 times as slow
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of the process as it was. Costs 0.1 ms, so once per batch, not per image."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class _Chain:
    """One stage after another: v2.Compose without the 30 us that modules take to be called."""

    def __init__(self, stages: Sequence[Transform]) -> None:
        self.stages = stages

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        for stage in self.stages:
            pixels_CHW = stage(pixels_CHW)
        return pixels_CHW


class _Square:
    """Resize the shorter side, crop the centre; nothing at all for an image that has the size already."""

    def __init__(self, image_size: int) -> None:
        self.shape = (image_size, image_size)

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        if pixels_CHW.shape[1:] == self.shape:
            return pixels_CHW
        shorter, longer = sorted(pixels_CHW.shape[1:])
        if longer > MAX_RATIO * shorter:
            kept = [min(side, MAX_RATIO * shorter) for side in pixels_CHW.shape[1:]]
            pixels_CHW = v2.functional.center_crop(pixels_CHW, kept)
        # Functions: v2.Compose of v2.Resize and v2.CenterCrop takes 40 us more an image.
        pixels_CHW = v2.functional.resize(pixels_CHW, [self.shape[0]], antialias=True)
        if pixels_CHW.shape[1:] == self.shape:
            return pixels_CHW
        return v2.functional.center_crop(pixels_CHW, list(self.shape))


class _RandomFlip:
    """Mirror left and right: v2.RandomHorizontalFlip, the same draws, without its overhead."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        return pixels_CHW.flip(-1) if torch.rand(1).item() < self.probability else pixels_CHW


class _RandomAffine:
    """Rotate, scale and shift about the centre; beyond the border the edge repeats.

    v2.RandomAffine fills with a constant, which draws black corners into white paper, and is twice as slow.
    What is only shifted moves by whole pixels: others would blur it, in training only.
    """

    def __init__(
        self, rotate_degrees: float, shift_fraction: float, scale_range: tuple[float, float]
    ) -> None:
        self.angle, self.shift, self.scale_range = math.radians(rotate_degrees), shift_fraction, scale_range
        self.resamples = rotate_degrees > 0 or scale_range != (1.0, 1.0)

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        turn, right, down = (2 * torch.rand(3) - 1).tolist()
        if not self.resamples:
            height, width = pixels_CHW.shape[1:]
            rows_H = torch.arange(height).sub_(round(down * self.shift * height)).clamp_(0, height - 1)
            columns_W = torch.arange(width).sub_(round(right * self.shift * width)).clamp_(0, width - 1)
            return pixels_CHW[:, rows_H[:, None], columns_W]
        low, high = self.scale_range
        scale = low + (high - low) * torch.rand(()).item()
        cos, sin = math.cos(turn * self.angle) / scale, math.sin(turn * self.angle) / scale
        # Where each output pixel is in the input; both images span -1 to 1.
        x, y = 2 * right * self.shift, 2 * down * self.shift
        inverse_32 = torch.tensor([[cos, -sin], [sin, cos], [-cos * x - sin * y, sin * x - cos * y]])
        grid_1HW2 = (_homogeneous_grid(*pixels_CHW.shape[1:]) @ inverse_32)[None]
        moved = F.grid_sample(pixels_CHW[None].float(), grid_1HW2, padding_mode="border", align_corners=False)
        return moved[0].round_().clamp_(0, 255).to(torch.uint8)


@functools.cache
def _homogeneous_grid(height: int, width: int) -> Tensor:
    """Return H x W x 3: x, y and 1 of every pixel. ``F.affine_grid`` would make it anew for each image."""
    x_W = (2 * torch.arange(width) + 1) / width - 1
    y_H = (2 * torch.arange(height) + 1) / height - 1
    y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
    return torch.stack([x_HW, y_HW, torch.ones_like(x_HW)], dim=-1)


class _RandomLowResolution:
    """Shrink to a fifth of the side or more and enlarge again: AdaFace's augmentation (Kim et al., 2022)."""

    SMALLEST = 0.2

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        chance, size = torch.rand(2).tolist()
        if chance >= self.probability:
            return pixels_CHW
        height, width = pixels_CHW.shape[1:]
        scale = self.SMALLEST + (1 - self.SMALLEST) * size
        smaller = [max(1, round(height * scale)), max(1, round(width * scale))]
        return v2.functional.resize(
            v2.functional.resize(pixels_CHW, smaller, antialias=True), [height, width], antialias=True
        )


class _RandomOcclusion:
    """Cover a quarter to a half of the image, from one of its four sides, with one shade of grey."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels_CHW: Tensor) -> Tensor:
        chance, part, side, grey = torch.rand(4).tolist()
        if chance >= self.probability:
            return pixels_CHW
        covered_CHW = pixels_CHW.clone()
        along = 1 + int(side * 4) // 2
        length = pixels_CHW.shape[along]
        count = round(length * (0.25 + 0.25 * part))
        covered_CHW.narrow(along, (length - count) * (int(side * 4) % 2), count).fill_(int(grey * 256))
        return covered_CHW
