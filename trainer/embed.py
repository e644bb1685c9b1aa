"""Embeddings of image sets: a whole set on every rank, a stream that nobody keeps, or files for millions.

::

    OUT/embeddings.json            number of images, type, rows per file, model and data with fingerprints
    OUT/classes.json               names of the labels
    OUT/embeddings-00000.npy       rows 0 to rows_per_file, float16 or float32, not normalised; then 00001 ...
    OUT/labels-00000.npy           their labels
    OUT/keys-00000.txt             their keys, one on each line
    OUT/failed-00000.txt           keys of those that could not be decoded; their rows are NaN

Batches are fixed runs of the set's own order, dealt to the ranks: an image's embedding is the same to the bit
on any number of them. A file is written whole by one rank and then renamed, so whatever was interrupted goes
on with the files that are not there yet.

Legend: N images of a set, B of a batch, D width of the embedding.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from trainer.augment import build_eval_transform
from trainer.backbone import image_size_of
from trainer.collectives import concatenate_over, from_main, wait_for_all
from trainer.config import Config
from trainer.data import build_loader
from trainer.decode import decode
from trainer.distributed import World
from trainer.errors import UserError
from trainer.imagesets import ImageSet, open_images

Embed = Callable[[Tensor], Tensor]
"""uint8 images of this rank -> embeddings; must not need gradients."""

SUMMARY = "embeddings.json"
CLASSES = "classes.json"


@dataclass(frozen=True)
class Reading:
    """How images become the input of a model, and what happens to those that cannot."""

    image_size: int
    channels: int
    batch_size: int = 64
    """Images of a batch on one rank."""
    workers: int = 0
    flip_sum: bool = False
    """Add the embedding of the mirror image."""
    skip_broken: bool = False
    """Leave out an image that cannot be decoded, instead of ending with its name."""


def reading_of(config: Config) -> Reading:
    """Return how the images of a run's model are read."""
    return Reading(
        image_size=image_size_of(config.backbone),
        channels=config.backbone.channels,
        workers=config.data.workers,
    )


class Embedded(NamedTuple):
    """Some rows of a set: only those that could be decoded."""

    positions_N: Tensor
    """Which images of the set; rising where it is a whole set."""
    embeddings_ND: Tensor
    """float32, not normalised, on the rank's device."""


class _Loaded(NamedTuple):
    positions_B: Tensor
    images_BCHW: Tensor
    failure: str | None


def embed_all(embed: Embed, images: ImageSet, reading: Reading, world: World) -> Embedded:
    """Return all embeddings of a set; every rank must call it and gets them all."""
    parts = list(stream(embed, images, reading, world))
    device = world.device
    widths = torch.tensor(
        [part.embeddings_ND.shape[1] for part in parts[:1]], dtype=torch.int64, device=device
    )
    width = concatenate_over(widths, world.group)  # a rank may have no batch at all
    if not len(width):
        raise UserError(f"{images.field}: none of its {len(images)} images can be decoded")
    nothing = (torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, int(width[0]), device=device))
    parts = parts or [Embedded(*nothing)]
    positions_N = concatenate_over(torch.cat([part.positions_N for part in parts]), world.group)
    embeddings_ND = concatenate_over(torch.cat([part.embeddings_ND for part in parts]), world.group)
    order_N = positions_N.argsort()
    return Embedded(positions_N[order_N], embeddings_ND[order_N])


def stream(embed: Embed, images: ImageSet, reading: Reading, world: World) -> Iterator[Embedded]:
    """Yield this rank's batches of a set; communicates nothing."""
    yield from _embedded(embed, images, reading, world, range(len(images)), world.rank, world.size)


def write_embeddings(
    embed: Embed,
    images: ImageSet,
    reading: Reading,
    world: World,
    out: Path,
    *,
    origin: dict[str, str],
    dtype: str = "float16",
    rows_per_file: int = 16384,
) -> Path:
    """Write the files of the module's docstring, going on where an earlier call was ended.

    Every rank must call it; files are dealt to the ranks. ``origin`` says which ``model`` and ``data`` they
    come from. Raises UserError if OUT holds embeddings of another origin or type, or of data that changed.
    """
    starts = range(0, len(images), rows_per_file)
    files = list(enumerate(starts))
    summary = {
        "num_images": len(images), "dtype": dtype, "rows_per_file": rows_per_file, "num_files": len(files),
        "flip_sum": reading.flip_sum, **origin,
    }  # fmt: skip
    failure = None
    if world.is_main:
        failure = claim(out, summary | {"data_fingerprint": images.fingerprint()}, images.class_names)
    failure = from_main(failure, world.group)
    if failure:
        raise UserError(failure)
    missing = [(number, start) for number, start in files if not _file(out, "embeddings", number).is_file()]
    wait_for_all(world.group)  # all have looked before any writes: they deal the same list
    for number, start in missing[world.rank :: world.size]:
        rows = range(start, min(start + rows_per_file, len(images)))
        parts = list(_embedded(embed, images, reading, world, rows, 0, 1))
        _write_file(out, number, images, rows, parts, np.dtype(dtype))
    wait_for_all(world.group)
    return out


class Embeddings:
    """What ``write_embeddings`` wrote, memory-mapped."""

    def __init__(self, folder: Path, field: str) -> None:
        self.folder, self.field = folder, field
        try:
            self.summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
            numbers = range(self.summary["num_files"])
            self.class_names: tuple[str, ...] = tuple(json.loads((folder / CLASSES).read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{field}: {folder}: cannot read embeddings: {error}") from None
        absent = [n for n in numbers if not _file(folder, "embeddings", n).is_file()]
        if absent:
            raise UserError(
                f"{field}: {folder} is incomplete: {len(absent)} of {len(numbers)} files are missing, the "
                f"first is {_file(folder, 'embeddings', absent[0]).name}; run launch/embed.py again"
            )
        self.files = [_array(_file(folder, "embeddings", n)) for n in numbers]
        self.labels_N = np.concatenate([_array(_file(folder, "labels", n)) for n in numbers])

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def width(self) -> int:
        """D."""
        return int(self.files[0].shape[1])

    @property
    def num_failed(self) -> int:
        """Images that could not be decoded."""
        return len(self.failed_keys)

    @property
    def failed_keys(self) -> list[str]:
        """Their keys."""
        return self._lines("failed", *range(len(self.files)))

    @property
    def keys(self) -> list[str]:
        """The key of every image."""
        return self._lines("keys", *range(len(self.files)))

    def _lines(self, kind: str, *numbers: int) -> list[str]:
        try:
            contents = [_file(self.folder, kind, number).read_bytes() for number in numbers]
        except OSError as error:
            raise UserError(f"{self.field}: {error.filename}: cannot read: {error.strerror}") from None
        return [key for c in contents for key in c.decode("utf-8", "surrogateescape").split("\n")[:-1]]

    def images(self) -> ImageSet:
        """Return the set that was embedded, without pixels; with notes if it is still where it was.

        The notes of data that have changed meanwhile raise UserError.
        """
        data = Path(self.summary["data"])

        def notes() -> Sequence[dict[str, Any]]:
            if not data.is_dir():
                return [{}] * len(self)
            found = open_images(data, self.field)
            if self.summary.get("data_fingerprint") not in (None, found.fingerprint()):
                raise UserError(f"{self.field}: {data} has changed since {self.folder} was made of it")
            return found.list_notes()

        def read(i: int) -> bytes:
            raise UserError(f"{self.field}: {self.folder} holds embeddings, not images")

        return ImageSet(
            field=self.field,
            labels_N=self.labels_N,
            class_names=self.class_names,
            read=read,
            describe=lambda i: f"{self.field}: image {self.keys[i]}",
            list_keys=lambda: self.keys,
            list_notes=notes,
        )

    def stream(self, world: World) -> Iterator[Embedded]:
        """Yield this rank's share, file by file; rows of what could not be decoded are left out."""
        for number in range(world.rank, len(self.files), world.size):
            yield self._rows(number, world.device)

    def load(self, device: torch.device) -> Embedded:
        """Return all of them."""
        positions_N = torch.empty(len(self), dtype=torch.int64, device=device)
        embeddings_ND = torch.empty(len(self), self.width, device=device)
        count = 0
        for number in range(len(self.files)):  # in place: parts and their whole would be twice as much
            positions, embeddings = self._rows(number, device)
            positions_N[count : count + len(positions)] = positions
            embeddings_ND[count : count + len(positions)] = embeddings
            count += len(positions)
        return Embedded(positions_N[:count], embeddings_ND[:count])

    def _rows(self, number: int, device: torch.device) -> Embedded:
        rows_ND = torch.from_numpy(np.array(self.files[number], dtype=np.float32)).to(device)
        kept_N = rows_ND.isfinite().all(dim=1)
        if not kept_N.all():
            keys, failed = self._lines("keys", number), set(self._lines("failed", number))
            for row in (~kept_N).nonzero().flatten().tolist():
                if keys[row] not in failed:
                    path = _file(self.folder, "embeddings", number)
                    raise UserError(f"{self.field}: {path}: row {row} ({keys[row]}) is not finite")
        first = number * self.summary["rows_per_file"]
        return Embedded(first + kept_N.nonzero().squeeze(1), rows_ND[kept_N])


def is_embeddings(path: Path) -> bool:
    """Say whether the folder is one of ``write_embeddings``."""
    return (path / SUMMARY).is_file()


class _Batches(Dataset[_Loaded]):
    """Item: the positions of a batch."""

    def __init__(self, images: ImageSet, reading: Reading) -> None:
        self.images, self.reading = images, reading
        self.transform = build_eval_transform(image_size=reading.image_size)

    def __getitem__(self, positions: range) -> _Loaded:
        kept, pixels = [], []
        for i in positions:
            try:
                pixels.append(self.transform(decode(self.images.read(i), self.reading.channels)))
                kept.append(i)
            except ValueError as error:
                if not self.reading.skip_broken:
                    return _Loaded(torch.empty(0), torch.empty(0), f"{self.images.describe(i)}: {error}")
            except UserError as error:
                return _Loaded(torch.empty(0), torch.empty(0), str(error))
        return _Loaded(torch.tensor(kept), torch.stack(pixels) if pixels else torch.empty(0), None)


@torch.no_grad()
def _embedded(
    embed: Embed, images: ImageSet, reading: Reading, world: World, rows: range, part: int, parts: int
) -> Iterator[Embedded]:
    """Yield every ``parts``-th batch of some rows, from batch ``part`` on."""
    batches = [rows[i : i + reading.batch_size] for i in range(0, len(rows), reading.batch_size)][part::parts]
    for batch in build_loader(_Batches(images, reading), batches, min(reading.workers, len(batches))):
        if batch.failure:
            raise UserError(f"rank {world.rank}: {batch.failure}")
        if not len(batch.positions_B):
            continue
        pixels = batch.images_BCHW.to(world.device)
        embeddings_BD = embed(pixels).float()
        if reading.flip_sum:
            embeddings_BD = embeddings_BD + embed(pixels.flip(3)).float()
        is_wrong_B = ~embeddings_BD.isfinite().all(dim=1)
        if is_wrong_B.any():
            wrong = images.describe(int(batch.positions_B[is_wrong_B.cpu()][0]))
            raise UserError(
                f"rank {world.rank}: {wrong}: its embedding is not finite: the model has diverged"
            )
        yield Embedded(batch.positions_B.to(world.device), embeddings_BD)


def claim(out: Path, summary: dict[str, Any], class_names: Sequence[str]) -> str | None:
    """Write the summary; return what is wrong if another is there. Rank 0 only."""
    path = out / SUMMARY
    try:
        if path.is_file():
            found = json.loads(path.read_text())
            known = {"data_fingerprint": summary.get("data_fingerprint")} | found  # once it was not written
            differing = [key for key in summary | known if summary.get(key) != known.get(key)]
            if differing:
                key = differing[0]
                return f"{out}: holds other embeddings: {key} is {known.get(key)!r}, not {summary.get(key)!r}"
            return None
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / CLASSES, lambda file: file.write(json.dumps(class_names).encode()))
        write_whole(path, lambda file: file.write((json.dumps(summary, indent=1) + "\n").encode()))
    except (OSError, ValueError) as error:
        return f"{out}: cannot write embeddings: {error}"
    return None


def _file(out: Path, kind: str, number: int) -> Path:
    return out / f"{kind}-{number:05d}.{'npy' if kind in ('embeddings', 'labels') else 'txt'}"


def _array(path: Path) -> NDArray[Any]:
    """Map an array into memory. Raises UserError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot read: {error}") from None


def _write_file(
    out: Path, number: int, images: ImageSet, rows: range, parts: list[Embedded], dtype: np.dtype[Any]
) -> None:
    """Write the files of some rows, NaN where an image could not be decoded. Raises UserError."""
    if not parts:
        raise UserError(f"{images.field}: none of images {rows.start} to {rows.stop} can be decoded")
    table: NDArray[Any] = np.full((len(rows), parts[0].embeddings_ND.shape[1]), np.nan, dtype=dtype)
    failed = set(rows)
    for part in parts:
        positions = part.positions_N.cpu().numpy()
        table[positions - rows.start] = part.embeddings_ND.cpu().numpy()
        failed -= set(positions.tolist())
        if not np.isfinite(table[positions - rows.start]).all():
            raise UserError(
                f"--dtype: an embedding does not fit {dtype}: take float32, or the model has diverged"
            )
    keys, failed_keys = [images.keys[i] for i in rows], [images.keys[i] for i in sorted(failed)]
    if broken := [key for key in keys if "\n" in key]:
        raise UserError(f"{images.field}: image {broken[0]!r} has a line break in its name")
    write_rows(out, number, table, images.labels_N[rows.start : rows.stop], keys, failed_keys)


def write_rows(
    out: Path,
    number: int,
    table_ND: NDArray[Any],
    labels_N: NDArray[np.int64],
    keys: Iterable[str],
    failed_keys: Iterable[str] = (),
) -> None:
    """Write the four files of some rows; the embeddings come last, and make them count."""
    write_whole(_file(out, "keys", number), lambda file: file.write(_lines(keys)))
    write_whole(_file(out, "failed", number), lambda file: file.write(_lines(failed_keys)))
    write_whole(_file(out, "labels", number), lambda file: np.save(file, labels_N, allow_pickle=False))
    write_whole(_file(out, "embeddings", number), lambda file: np.save(file, table_ND, allow_pickle=False))


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode("utf-8", "surrogateescape")


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file that is complete or absent. Raises UserError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None
