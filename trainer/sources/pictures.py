"""The formats of images on their way into data shards: copied where every reader knows them, else PNG."""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer.errors import UserError
from trainer.pixels import FORMATS, check_size, flatten

COPIED = ("png", "jpg", "jpeg", "webp")
RECODED = ("bmp", "dib", "pgm", "ppm", "pbm", "pnm", "gif", "tif", "tiff")
JPEG_QUALITY = 95  # where an image must be encoded again and nobody says how

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


def is_image(extension: str) -> bool:
    """Say whether files of this extension (lower case, no dot) are images that can be packed."""
    return extension in COPIED or extension in RECODED


def packable(content: bytes, extension: str, where: str) -> tuple[bytes, str]:
    """Return an image file as it is packed, and its extension. Raises UserError beginning with ``where``."""
    return (content, extension) if extension in COPIED else (as_png(content, where), "png")


def sniffed(content: bytes, where: str) -> tuple[bytes, str]:
    """Return an image without a name as it is packed, and the extension its first bytes stand for."""
    for signature, extension in _SIGNATURES.items():
        if content.startswith(signature):
            return content, extension
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return content, "webp"
    return as_png(content, where), "png"


def recode(
    content: bytes, extension: str, shorter_side: int | None, jpeg_quality: int | None
) -> tuple[bytes, str]:
    """Scale an image down to ``shorter_side`` pixels, or encode it as JPEG, or both; never enlarge.

    Without a quality, PNG stays PNG and the rest becomes JPEG of quality 95; an image that is small enough is
    copied. It gets the 8 bits, and the white paper behind it, that training would have given it. Raises
    ValueError in one line.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            too_large = shorter_side is not None and min(image.size) > shorter_side
            if not too_large and jpeg_quality is None:
                return content, extension
            is_grey = image.mode.startswith(("1", "L", "I"))
            pixels = flatten(image).convert("L" if is_grey else "RGB")
    except UnidentifiedImageError:
        raise ValueError("cannot decode: not an image") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise ValueError(f"cannot decode: {' '.join(str(error).split())}") from None
    if too_large:
        assert shorter_side is not None
        ratio = shorter_side / min(pixels.size)
        width, height = (max(shorter_side, round(side * ratio)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    if extension == "png" and jpeg_quality is None:
        return png_bytes(pixels), "png"
    return jpeg_bytes(pixels, jpeg_quality or JPEG_QUALITY), "jpg"


def flaw(content: bytes) -> str | None:
    """Return why an image cannot be trained on, in one line; None if it decodes to its last row."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.width, image.height)
            image.load()
            flatten(image)
    except UnidentifiedImageError:
        return f"cannot decode: not one of {', '.join(FORMATS)}"
    except Exception as error:  # PIL raises nearly anything on broken bytes
        return f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def rgb_pixels(content: bytes, where: str) -> NDArray[np.uint8]:
    """Return H x W x 3 pixels. Raises UserError beginning with ``where``."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.width, image.height)
            return np.asarray(flatten(image).convert("RGB"))
    except UnidentifiedImageError:
        raise UserError(f"{where}: cannot decode: not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise UserError(f"{where}: cannot decode: {' '.join(str(error).split())}") from None


def as_png(content: bytes, where: str) -> bytes:
    """Encode the first frame of any image as PNG, without loss."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode == "F" or (image.mode == "I" and not _fits_16_bits(image)):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range")
            if image.mode.startswith("I"):
                # Through numpy: PIL would clip big-endian pixels at 255.
                return png_bytes(Image.fromarray(np.asarray(image).astype(np.uint16)))
            return png_bytes(image if image.mode in _PNG_MODES else image.convert("RGB"))
    except UnidentifiedImageError:
        raise UserError(f"{where}: cannot decode: not an image") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise UserError(f"{where}: cannot decode: {' '.join(str(error).split())}") from None


def png_bytes(image: Image.Image) -> bytes:
    """Encode as PNG."""
    return _encoded(image, "PNG")


def jpeg_bytes(image: Image.Image, quality: int) -> bytes:
    """Encode as JPEG of a quality from 1 to 100."""
    return _encoded(image, "JPEG", quality=quality)


def _encoded(image: Image.Image, kind: Literal["PNG", "JPEG"], **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _fits_16_bits(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool(pixels.min() >= 0 and pixels.max() < 1 << 16)
