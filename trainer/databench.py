"""What reading, decoding and batching cost on this machine, beside the usual ways, in turn in one process.

The usual ways are webdataset's stream and torchvision's ImageFolder, both with PIL, ToTensor and Normalize.
Each stage gives one dictionary: for every way images per second and CPU seconds per 1000 images (of this
process and its workers), medians over rounds in which all ways take their turn; on a shared machine only the
ratios of such figures mean something.
"""

import dataclasses
import io
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from trainer.augment import build_train_transform
from trainer.data import build_train_loader
from trainer.decode import decode
from trainer.errors import UserError
from trainer.index import Index, open_index
from trainer.order import Position, epoch_order
from trainer.shards import webdataset_loader

MEAN = STD = (0.5, 0.5, 0.5)
SHUFFLE_BUFFER = 1000
Way = Callable[[], int]
"""Does its work once and returns how many images that was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCase:
    """One measurement."""

    folder: Path
    workers: int
    against: tuple[str, ...]
    batch: int
    image_size: int
    images: int
    rounds: int


def measure_data(case: DataCase) -> Iterator[dict[str, Any]]:
    """Yield the figures of one stage after another: read, decode, batch, loader. Raises UserError."""
    index = open_index(case.folder, "FOLDER")
    case = dataclasses.replace(case, images=min(case.images, index.num_samples))
    if case.batch > case.images:
        raise UserError(f"--batch: {case.batch} is more than the {case.images} images that are measured")
    if "webdataset" in case.against and case.workers > len(index.shards):
        raise UserError(
            f"--workers: webdataset needs a shard for each, {case.folder} has {len(index.shards)}"
        )
    with TemporaryDirectory() as scratch:
        files = _extract(index, case.images, Path(scratch)) if "pil" in case.against else None
        for stage, ways in _stages(case, index, files):
            yield {"name": f"data-{stage}", **_describe(case, stage), **_figures(_in_turn(ways, case.rounds))}


def _stages(case: DataCase, index: Index, files: Path | None) -> Iterator[tuple[str, dict[str, Way]]]:
    """Yield (name of the stage, the ways to do it); ours is the first."""
    order = epoch_order(index.num_samples, seed=0, epoch=0)[: case.images].tolist()
    steps = [order[i : i + case.batch] for i in range(0, len(order), case.batch)]
    contents = index.read_many(order)
    sizes = {_size(index, i, content) for i, content in zip(order, contents, strict=True)}
    usual = _usual_transform(None if sizes == {(case.image_size,) * 2} else case.image_size)

    read: dict[str, Way] = {"ours": lambda: sum(len(index.read_many(step)) for step in steps)}
    if "webdataset" in case.against:
        stream = webdataset_loader(case.folder, None, shuffle_buffer=0)
        read["webdataset"] = lambda: _count(itertools.islice(stream, case.images))
    if files is not None:
        paths = [path for path, _ in ImageFolder(files).samples]
        read["pil"] = lambda: sum(len(Path(path).read_bytes()) > 0 for path in paths)
    yield "read", read

    yield (
        "decode",
        {
            "ours": lambda: _count(decode(content, 3) for content in contents),
            **({"pil": lambda: _count(map(_pil, contents))} if case.against else {}),
        },
    )

    def usual_batches() -> int:
        return sum(
            len(default_collate([usual(_pil(content)) for content in contents[i : i + case.batch]]))
            for i in range(0, len(contents), case.batch)
        )

    # Ours reads too: the loader of training knows no bytes that are in memory already.
    yield (
        "batch",
        {
            "ours": lambda: _ours(case, index, workers=0, normalise=False),
            "ours_normalised": lambda: _ours(case, index, workers=0, normalise=True),
            **({"pil": usual_batches} if case.against else {}),
        },
    )

    loader: dict[str, Way] = {
        "ours": lambda: _ours(case, index, workers=case.workers, normalise=False),
        "ours_normalised": lambda: _ours(case, index, workers=case.workers, normalise=True),
    }
    if "webdataset" in case.against:
        decoded = webdataset_loader(case.folder, usual, SHUFFLE_BUFFER)
        loader["webdataset"] = lambda: _usual_loader(case, decoded)
    if files is not None:
        folder = ImageFolder(files, usual)
        loader["pil"] = lambda: _usual_loader(case, folder, shuffle=True)
    yield "loader", loader


def _ours(case: DataCase, index: Index, *, workers: int, normalise: bool) -> int:
    """Run the loader of training over the images; ``normalise`` does on this CPU what the device does."""
    batches = build_train_loader(
        index,
        build_train_transform(image_size=case.image_size, flip_probability=0.5),
        channels=3,
        global_batch=case.batch,
        accumulation=1,
        seed=0,
        rank=0,
        world_size=1,
        workers=workers,
        start=Position(),
    )
    steps = case.images // case.batch
    with closing(batches):
        for batch, _ in itertools.islice(batches, steps):
            if normalise:
                _normalised(batch.images_NCHW)
    return steps * case.batch


def _normalised(images_NCHW: Tensor) -> Tensor:
    """Do what ``trainer.backbone`` does with a batch."""
    floats_NCHW = images_NCHW.to(torch.float32, memory_format=torch.contiguous_format)
    mean_C11, std_C11 = (255 * torch.tensor(numbers).view(-1, 1, 1) for numbers in (MEAN, STD))
    return (floats_NCHW - mean_C11) / std_C11


def _usual_transform(image_size: int | None) -> Callable[[Any], Tensor]:
    """Return flip, ToTensor and Normalize, behind a resize if images are not of one size."""
    resize = [transforms.Resize(image_size), transforms.CenterCrop(image_size)] if image_size else []
    last = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([*resize, *last])


def _usual_loader(case: DataCase, samples: Any, **options: Any) -> int:
    loader = DataLoader(samples, batch_size=case.batch, num_workers=case.workers, drop_last=True, **options)
    steps = case.images // case.batch
    return sum(len(labels) for _, labels in itertools.islice(loader, steps))


def _size(index: Index, i: int, content: bytes) -> tuple[int, ...]:
    """Return height and width. Raises UserError naming the sample if it cannot be decoded."""
    try:
        return decode(content, 3).shape[1:]
    except ValueError as error:
        raise UserError(f"{index.describe(i)}: {error}") from None


def _pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _count(items: Iterable[Any]) -> int:
    return sum(1 for _ in items)


def _extract(index: Index, count: int, folder: Path) -> Path:
    """Write images as files below a folder for each class, as ImageFolder reads them."""
    for i in range(count):
        extension = index.member_name(i).rpartition(".")[2]
        path = folder / f"{index.labels_N[i]:07d}" / f"{i:09d}.{extension}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(index.read(i))
    return folder


def _describe(case: DataCase, stage: str) -> dict[str, Any]:
    described = {"images": case.images, "image_size": case.image_size, "threads": torch.get_num_threads()}
    if stage in ("batch", "loader"):
        described["batch"] = case.batch
    return described | ({"workers": case.workers} if stage == "loader" else {})


def _in_turn(ways: dict[str, Way], rounds: int) -> dict[str, tuple[float, float]]:
    """Return of each way the median of (seconds, CPU seconds) per image; a first round is not counted."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began, cpu_began = time.perf_counter(), _cpu_seconds()
            images = way()
            took = (time.perf_counter() - began) / images, (_cpu_seconds() - cpu_began) / images
            if turn:
                measured[name].append(took)
    return {
        name: (statistics.median(t for t, _ in values), statistics.median(c for _, c in values))
        for name, values in measured.items()
    }


def _cpu_seconds() -> float:
    """Return what this process and those of its children that have ended have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _figures(measured: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return the figures of every way, and how many times faster ours is."""
    figures: dict[str, float] = {}
    ours_seconds, ours_cpu = measured["ours"]
    for name, (seconds, cpu) in measured.items():
        prefix = "" if name == "ours" else f"{name}_"
        figures[f"{prefix}images_per_second"] = 1 / seconds
        figures[f"{prefix}cpu_seconds_per_1000"] = 1000 * cpu
        if name in ("webdataset", "pil"):
            figures[f"speedup_over_{name}"] = seconds / ours_seconds
            figures[f"cpu_ratio_to_{name}"] = cpu / ours_cpu
    return figures
