"""From the bytes of an image to the uint8 tensor that is sent to the device.

Pixels stay uint8 until they are there (a quarter of the traffic); the backbone normalises them. What is
random draws from the process-wide generators, which ``seeded`` sets for one sample and puts back. Shapes:
C channels, H height, W width.
"""

import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]
"""From one uint8 CHW image to another."""

MAX_PIXELS = 1 << 26  # a small file can claim to be an image that fills the memory
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def decode(image_bytes: bytes, channels: int) -> Tensor:
    """Return pixels_CHW uint8: grey for one channel, RGB for three; what is transparent becomes white.

    Raises ValueError, in one line, for whatever is wrong with the bytes.
    """
    try:
        with Image.open(io.BytesIO(image_bytes), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {MAX_PIXELS}")
            image.load()
            pixels = np.array(_flatten(image).convert({1: "L", 3: "RGB"}[channels]))
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise ValueError(f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


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
) -> Transform:
    """Return the random transform of training; a stage whose parameter is neutral is left out."""
    stages: list[torch.nn.Module] = []
    if crop_scale is None:
        stages.append(_Square(image_size))
    else:
        stages.append(v2.RandomResizedCrop(image_size, scale=crop_scale, antialias=True))
    if flip_probability > 0:
        stages.append(v2.RandomHorizontalFlip(flip_probability))
    if rotate_degrees > 0 or shift_fraction > 0 or scale_range not in (None, (1.0, 1.0)):
        stages += _affine(image_size, rotate_degrees, shift_fraction, scale_range or (1.0, 1.0))
    if color_jitter > 0:
        stages.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if erase_probability > 0:
        stages.append(v2.RandomErasing(erase_probability))
    return v2.Compose(stages)


def build_eval_transform(*, image_size: int) -> Transform:
    """Return the fixed transform of evaluation: shorter side to ``image_size``, then the central square."""
    return _Square(image_size)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Draw inside the block from a 64-bit ``key`` alone, and leave the caller's random state as it was."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(
        key
    )  # torch.manual_seed would also visit every device: 10 times as slow
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _flatten(image: Image.Image) -> Image.Image:
    """Return what a viewer shows on white paper, in a mode of 8 bits per channel."""
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I;16"):  # PIL would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    return image


class _Square(torch.nn.Module):
    """Resize the shorter side, crop the centre; nothing at all for an image that has the size already."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.shape = (image_size, image_size)
        self.stages = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])

    def forward(self, pixels_CHW: Tensor) -> Tensor:
        return pixels_CHW if pixels_CHW.shape[1:] == self.shape else self.stages(pixels_CHW)


def _affine(
    image_size: int, rotate_degrees: float, shift_fraction: float, scale_range: tuple[float, float]
) -> list[torch.nn.Module]:
    """Rotate, shift and scale over a border that repeats the image's edge.

    A constant fill would draw black corners into white paper. Along each axis an output pixel is at most
    size / 2 + shift from the centre; rotation and zoom take it to (size / 2 + shift) (cos + sin) / scale.
    """
    angle = math.radians(min(rotate_degrees, 45.0))
    reach = (0.5 + shift_fraction) * (math.cos(angle) + math.sin(angle)) / min(scale_range)
    border = max(0, math.ceil((reach - 0.5) * image_size)) + 1
    shift = shift_fraction * image_size / (image_size + 2 * border)  # v2 takes fractions of the padded side
    return [
        v2.Pad(border, padding_mode="edge"),
        v2.RandomAffine(
            rotate_degrees,
            translate=(shift, shift) if shift > 0 else None,
            scale=scale_range if scale_range != (1.0, 1.0) else None,
            interpolation=v2.InterpolationMode.BILINEAR,
        ),
        v2.CenterCrop(image_size),
    ]
