"""Sets whose classes are folders of images: any such folder or zip, Omniglot, the ORL faces."""

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from trainer.errors import UserError
from trainer.folders import walk
from trainer.sources.files import Files, extension_of, open_files
from trainer.sources.pictures import is_image, packable
from trainer.sources.source import Source

# fmt: off
OMNIGLOT_EVALUATION = (
    "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta",
    "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada", "Keble",
    "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya",
    "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
)
"""The 20 alphabets (659 characters) that the authors keep for evaluation; the other 30 are background."""
# fmt: on

ORL_TRAIN_PEOPLE = 30  # of 40; the others are strangers to the network


def image_folder(root: Path) -> Source:
    """Return the images below a folder (or in a zip); a class is a folder, named by its path from ``root``.

    Hidden files are ignored, files that are no images are counted. Raises UserError for a class folder
    without images, and for an image that lies outside of any class folder.
    """
    if not root.exists():
        raise UserError(f"{root} is not a folder")
    for folder, subfolders, names in walk(root) if root.is_dir() else ():
        if folder != root and not subfolders and not any(is_image(extension_of(name)) for name in names):
            raise UserError(f"{folder} is a class folder without images")
    return image_files(open_files(root))


def image_files(files: Files, below: str = "") -> Source:
    """Return those images of ``files`` that lie below a folder; the path in between is the class."""
    names = [name for name in files.names if name.startswith(below)]
    images = [name for name in names if is_image(extension_of(name))]
    for name in images:
        if "/" not in name.removeprefix(below):
            raise UserError(f"{files.root / name} lies outside of any class folder")
    if not images:
        raise UserError(f"{files.root / below} holds no images (CLASS/IMAGE.jpg, or .png, .webp, ...)")
    return read_from(
        files,
        images,
        [name.removeprefix(below).rpartition("/")[0] for name in images],
        len(names) - len(images),
    )


def read_from(files: Files, images: list[str], classes: list[str], skipped: int = 0) -> Source:
    """Return the source of some images among ``files``."""

    def read(i: int) -> tuple[bytes, str]:
        name = images[i]
        return packable(files.read(name), extension_of(name), f"{files.root}/{name}")

    origins = [files.root / name for name in images] if files.root.is_dir() else files.origins
    return Source(classes, read, skipped, origins)


def omniglot(path: Path, split: Literal["background", "evaluation"]) -> Source:
    """Return one side of Omniglot from a zip or a folder of ``Alphabet/characterNN/IMAGE.png``.

    A class is a character. Raises UserError if an evaluation alphabet is missing: the split would be another.
    """
    files = open_files(path)
    pngs = sorted(n for n in files.names if len(PurePosixPath(n).parts) == 3 and n.endswith(".png"))
    missing = set(OMNIGLOT_EVALUATION) - {name.split("/")[0] for name in pngs}
    if missing:
        raise UserError(f"{path} is not Omniglot: no {min(missing)}/characterNN/IMAGE.png in it")
    wanted = split == "evaluation"
    chosen = [name for name in pngs if (name.split("/")[0] in OMNIGLOT_EVALUATION) == wanted]
    classes = [name.rpartition("/")[0] for name in chosen]
    return read_from(files, chosen, classes, skipped=len(files.names) - len(pngs))


def orl(path: Path, split: Literal["train", "test"]) -> Source:
    """Return the ORL faces s1..s30 (train) or s31..s40 (test) from a zip or folder of ``sN/M.pgm``."""
    files = open_files(path)
    person_of = {name: int(m[1]) for name in files.names if (m := re.fullmatch(r"s(\d{1,4})/\d+\.pgm", name))}
    if set(person_of.values()) != set(range(1, 41)):
        raise UserError(f"{path} is not the ORL faces: not the people s1 to s40 with sN/M.pgm each")
    wanted = split == "test"
    chosen = sorted(n for n, person in person_of.items() if (person > ORL_TRAIN_PEOPLE) == wanted)
    skipped = len(files.names) - len(person_of)
    return read_from(files, chosen, [name.rpartition("/")[0] for name in chosen], skipped)
