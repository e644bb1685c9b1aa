"""The regions of a person, cut out around the head, which is what is marked on photos.

With the head's box (x, y, w, h) and cx its middle, x + w / 2 (those of papers on PIPA; faces are not marked):

    head    the box                       face    its middle 70 %, a rule of ours
    upper   (cx - w, y, 2 w, 3 h)         body    (cx - w, y, 2 w, 6 h)

Packing for training and cutting out for judging must agree on this to the pixel.
"""

from collections.abc import Sequence

REGIONS = ("head", "face", "upper", "body")

Box = tuple[float, float, float, float]


def region_box(head: Sequence[float], region: str) -> Box:
    """Return left, top, right, bottom of a region of a person whose head box is x, y, width, height."""
    x, y, w, h = head
    left, top, width, height = {
        "head": (x, y, w, h),
        "face": (x + 0.15 * w, y + 0.15 * h, 0.7 * w, 0.7 * h),
        "upper": (x - w / 2, y, 2 * w, 3 * h),
        "body": (x - w / 2, y, 2 * w, 6 * h),
    }[region]
    return left, top, left + width, top + height


def within_photo(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the whole pixels of a box that lie on the photo. Raises ValueError if there are none."""
    left, right = (min(max(round(edge), 0), width) for edge in box[::2])
    top, bottom = (min(max(round(edge), 0), height) for edge in box[1::2])
    if left >= right or top >= bottom:
        raise ValueError(f"the region {box} lies outside of the photo of {width} x {height} pixels")
    return left, top, right, bottom
