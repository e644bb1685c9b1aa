"""Photo albums in PIPA's files: who is where on which photo, and the regions of a person cut out.

::

    ALBUM/split_test_original.txt    photoset photo xmin ymin width height identity subset half, on each line
    ALBUM/split_val_original.txt     ... album, time, day
    ALBUM/{leftover,train,val,test}/PHOTOSET_PHOTO.jpg

Boxes are of heads; ``trainer/regions.py`` says what is cut out around them.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.decode import decode
from trainer.errors import UserError
from trainer.imagesets import ImageSet
from trainer.regions import Box, region_box, within_photo

SUBSETS = ("leftover", "train", "val", "test")
"""Names of the subset codes 0 to 3, as counted in the annotation; its own description has another order."""


@dataclass(frozen=True)
class Instances:
    """The persons of one split file."""

    folder: Path
    photos: tuple[str, ...]
    """``SUBSET/PHOTOSET_PHOTO.jpg`` of each instance."""
    boxes_N4: NDArray[np.int64]
    """x, y, width, height of the head in pixels."""
    identities_N: NDArray[np.int64]
    halves_N: NDArray[np.int64]
    """0 or 1."""


def read_split(folder: Path, part: str, split: str) -> Instances:
    """Read ``split_PART_SPLIT.txt``. Raises UserError naming file and line."""
    path = folder / f"split_{part}_{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the split: {error}") from None
    photos, rows = [], []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        try:
            values = [int(word) for word in words[2:]]
            if len(values) != 7 or not 0 <= values[5] < len(SUBSETS) or values[6] not in (0, 1):
                raise ValueError
        except ValueError:
            raise UserError(f"{path}:{number}: not 'photoset photo x y w h identity subset half'") from None
        photos.append(f"{SUBSETS[values[5]]}/{words[0]}_{words[1]}.jpg")
        rows.append(values)
    if not rows:
        raise UserError(f"{path}: holds no instance")
    table = np.array(rows, dtype=np.int64)
    return Instances(folder, tuple(photos), table[:, :4], table[:, 4], table[:, 6])


def crops(instances: Instances, region: str, field: str) -> ImageSet:
    """Return one region of every instance as an image set; photos are opened when they are read."""

    def read(i: int) -> bytes:
        path = instances.folder / instances.photos[i]
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # of photos that were crawled some are gone: who judges may count them
            raise ValueError("is not there") from None
        except OSError as error:
            raise UserError(f"{field}: {path}: cannot read: {error.strerror}") from None
        return _cut(content, region_box(instances.boxes_N4[i].tolist(), region))

    return ImageSet(
        field=field,
        labels_N=instances.identities_N,
        class_names=(),
        read=read,
        describe=lambda i: (
            f"{field}: {instances.folder / instances.photos[i]}, head {instances.boxes_N4[i].tolist()}"
        ),
        list_keys=lambda: instances.photos,
        list_notes=lambda: [{} for _ in instances.photos],
    )


def _cut(content: bytes, box: Box) -> bytes:
    """Return a part of a photo as a PNG. Raises ValueError if it lies outside."""
    pixels_CHW = decode(content, 3)
    height, width = pixels_CHW.shape[1:]
    left, top, right, bottom = within_photo(box, width, height)
    cut = io.BytesIO()
    pixels = pixels_CHW[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(cut, "PNG", compress_level=1)
    return cut.getvalue()
