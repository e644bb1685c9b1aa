"""Which images are read, up to how many pixels, and what they look like: for packing and training alike."""

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 1 << 26  # a small file can claim to be an image that fills the memory


def check_size(width: int, height: int) -> None:
    """Raise ValueError for more than ``MAX_PIXELS``."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are above the limit of {MAX_PIXELS}")


def flatten(image: Image.Image) -> Image.Image:
    """Return what a viewer shows on white paper, in a mode of 8 bits per channel. Raises ValueError."""
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I;16"):  # PIL would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    return image
