"""From the bytes of an image to uint8 pixels, within a limit of pixels.

JPEGs go through libjpeg-turbo without PIL, twice as fast and to the same pixels; all else, and what that
library does not take (CMYK, or bytes it finds broken), goes through PIL, which has the last word. Which way
is taken depends on the bytes alone, so an image has the same pixels on every rank and machine. They are
those that are stored: a camera's note on which side is up (EXIF) turns nothing, as in torchvision. (For PNGs,
torchvision's libpng is three times as fast as PIL, and crashes the process on some spoilt bytes.) Shapes:
C channels, H height, W width.
"""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainer.pixels import FORMATS, check_size, flatten

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
    check_size(width, height)
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
            check_size(image.width, image.height)
            flat, mode = flatten(image), {1: "L", 3: "RGB"}[channels]
            pixels = np.array(flat if flat.mode == mode else flat.convert(mode))
    except UnidentifiedImageError:
        raise ValueError(f"cannot decode: not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise ValueError(f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}") from None
    return pixels.reshape(*pixels.shape[:2], channels)
