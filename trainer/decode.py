"""From the bytes of an image to uint8 pixels, within a limit of pixels.

JPEGs go through libjpeg-turbo without PIL, twice as fast and to the same pixels; all else, and what that
library does not take (CMYK, or bytes it finds broken), goes through PIL, which has the last word. Which way
is taken depends on the bytes alone, so an image has the same pixels on every rank and machine. (For PNGs,
torchvision's libpng is three times as fast as PIL, and crashes the process on some spoilt bytes.) Shapes:
C channels, H height, W width.
"""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 1 << 26  # a small file can claim to be an image that fills the memory
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")


def decode(image_bytes: bytes, channels: int, smallest_side: int | None = None) -> Tensor:
    """Return pixels_CHW uint8: grey for one channel, RGB for three; what is transparent becomes white.

    In memory the channels of a pixel are neighbours. Grey of a colour JPEG is its luma as it is stored. With
    ``smallest_side`` a JPEG is decoded at 1/2, 3/8, 1/4 or 1/8 of its size if both sides stay at least that
    long: faster, and not the pixels of the whole image made smaller. Raises ValueError, in one line, for
    whatever is wrong with the bytes.
    """
    pixels_HWC = None
    if image_bytes.startswith(_JPEG_START):
        pixels_HWC = _decode_jpeg(image_bytes, channels, smallest_side)
    if pixels_HWC is None:
        pixels_HWC = _decode_any(image_bytes, channels)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decode_jpeg(image_bytes: bytes, channels: int, smallest_side: int | None) -> np.ndarray | None:
    """Return pixels_HWC, or None if PIL has to look at it. Raises ValueError above the limit of pixels."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image_bytes)
    except ValueError:
        return None
    if colours not in _JPEG_COLOURS:
        return None
    _check_size(width, height)
    side = 0 if smallest_side is None else smallest_side
    smaller = {"min_height": side, "min_width": side, "min_factor": 2.0 if side else 1.0}
    try:
        return simplejpeg.decode_jpeg(image_bytes, {1: "GRAY", 3: "RGB"}[channels], **smaller)
    except ValueError:
        return None


def _decode_any(image_bytes: bytes, channels: int) -> np.ndarray:
    """Return pixels_HWC as PIL sees them."""
    try:
        with Image.open(io.BytesIO(image_bytes), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            flat, mode = _flatten(image), {1: "L", 3: "RGB"}[channels]
            pixels = np.array(flat if flat.mode == mode else flat.convert(mode))
    except UnidentifiedImageError:
        raise ValueError(f"cannot decode: not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise ValueError(f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are above the limit of {MAX_PIXELS}")


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
