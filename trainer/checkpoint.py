"""Checkpoints: what a run is made of, written by its ranks and read on any number of others.

::

    runs/NAME/checkpoints/step-00000400/
        state.json             step, data position, numbers of optimizer and loss scaler, the configuration
        classes.json           the name of every class, in the order of the labels
        backbone.safetensors   parameters, buffers and optimizer state, full tensors in float32
        head-00000.safetensors rows of rank 0, their optimizer state, and which rows they are
        head-00001.safetensors ...
        manifest.json          size and sha256 of each of them

Only safetensors and JSON are read: nothing in a checkpoint can run code. ``trainer/saving.py`` lets all ranks
write together, and makes a checkpoint whole or absent.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.manifest import FORMAT, Entry, complete_checkpoints, entry_of, read_record, verify, write_json
from trainer.optimizer import set_steps_taken, state_keys
from trainer.tensorfile import write_tensors

__all__ = [
    "FORMAT", "Contents", "complete_checkpoints", "head_tensors", "load_head", "load_head_rows",
    "read_record", "read_rows", "read_tensors", "stream_rows", "verify", "write_files",
]  # fmt: skip

_BUFFER_BYTES = 16 << 20


@dataclass(frozen=True)
class Contents:
    """What goes into one checkpoint, as one rank has it."""

    step: int
    record: dict[str, Any]
    """Written by rank 0, as state.json."""
    backbone: dict[str, Tensor]
    """Written by rank 0, as ``class_names`` are."""
    head: dict[str, Tensor]
    """The rows of this rank, and which they are: written by each."""
    shard: ClassShard
    class_names: Sequence[str] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.backbone.values(), *self.head.values()))


def write_files(folder: Path, contents: Contents, rank: int) -> dict[str, Entry]:
    """Write what is up to this rank; return the entries of its files by name."""
    rank_file, shard = f"head-{rank:05d}.safetensors", contents.shard
    rows = {"start": shard.start, "stop": shard.stop, "num_classes": shard.num_classes}
    metadata = {key: str(value) for key, value in rows.items()}
    entries = {rank_file: write_tensors(folder / rank_file, contents.head, metadata)}
    if rank == 0:
        entries["backbone.safetensors"] = write_tensors(
            folder / "backbone.safetensors", contents.backbone, {}
        )
        record = {"format": FORMAT, "step": contents.step, **contents.record}
        for name, value in {"state.json": record, "classes.json": list(contents.class_names)}.items():
            write_json(folder / name, value)
            entries[name] = entry_of(folder / name)
    return entries


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file. Raises UserError naming the file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_rows(path: Path, shard: ClassShard) -> dict[str, Tensor]:
    """Return the head's tensors for the classes of ``shard``, from however many ranks wrote them.

    Reads only the rows asked for. Raises UserError if the checkpoint has other classes.
    """
    whole: dict[str, Tensor] = {}
    for name, low, values in stream_rows(path, shard):
        if name not in whole:
            whole[name] = values.new_empty((len(shard), *values.shape[1:]))
        whole[name][low : low + len(values)] = values
    return whole


def stream_rows(path: Path, shard: ClassShard) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (name, first row within ``shard``, rows) of the head's tensors, a few MB at a time.

    What there is is looked at before the first is yielded. Raises UserError if rows are missing or others.
    """
    with ExitStack() as stack:
        parts = []
        for part in sorted(path.glob("head-*.safetensors")):
            file = stack.enter_context(_opened(part))
            rows = {key: int(value) for key, value in (file.metadata() or {}).items()}
            if rows.keys() != {"start", "stop", "num_classes"}:
                raise UserError(f"{part}: does not say which rows of the head it holds")
            if rows["num_classes"] != shard.num_classes:
                raise UserError(
                    f"{path}: holds {rows['num_classes']} classes, this run has {shard.num_classes}"
                )
            low, high = max(rows["start"], shard.start), min(rows["stop"], shard.stop)
            if low < high:
                parts.append((low, high, rows["start"], file))
        parts.sort(key=lambda entry: entry[0])
        bounds = [shard.start, *(high for _, high, _, _ in parts)]
        if [low for low, *_ in parts] != bounds[:-1] or bounds[-1] != shard.stop:
            raise UserError(f"{path}: rows {shard.start} to {shard.stop} of the head are not all there")
        if any(set(file.keys()) != set(parts[0][3].keys()) for *_, file in parts):
            raise UserError(f"{path}: the files of the head do not hold the same tensors")
        for low, high, start, file in parts:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                values = file.get_slice(name)
                row_bytes = 8 * max(1, torch.Size(values.get_shape()[1:]).numel())
                step = max(1, _BUFFER_BYTES // row_bytes)
                for first in range(low, high, step):
                    last = min(first + step, high)
                    yield name, first - shard.start, values[first - start : last - start]


def head_tensors(head: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's rows and their optimizer state, themselves; the first dimension is the class."""
    return {name: tensor.detach() for name, tensor in _places(head, optimizer).items()}


@torch.no_grad()
def load_head(
    head: nn.Module, optimizer: Optimizer | None, tensors: dict[str, Tensor], steps: int = 0
) -> None:
    """Set what ``head_tensors`` returned; without an optimizer only the rows. Raises UserError."""
    for name, place in _places(head, optimizer).items():
        if name not in tensors:
            raise UserError(f"loss.name, loss.extra: checkpoint of another loss: it has no {name}")
        place.copy_(tensors[name])
    if optimizer:
        set_steps_taken(optimizer, steps)


@torch.no_grad()
def load_head_rows(head: nn.Module, optimizer: Optimizer, path: Path, shard: ClassShard, steps: int) -> None:
    """Set this rank's rows and their optimizer state from a checkpoint, holding no second copy of them.

    Raises UserError if the checkpoint's head has other tensors.
    """
    places = _places(head, optimizer)
    missing = set(places)
    for name, low, values in stream_rows(path, shard):
        place = places.get(name)
        if place is None or place.shape[1:] != values.shape[1:]:
            here = "missing" if place is None else str(list(place.shape[1:]))
            raise UserError(
                f"{path}: checkpoint of another model: a row of {name} is {list(values.shape[1:])} there "
                f"and {here} here"
            )
        place[low : low + len(values)] = values
        missing.discard(name)
    if missing:
        raise UserError(f"{path}: checkpoint of another model: it has no {', '.join(sorted(missing))}")
    set_steps_taken(optimizer, steps)


def _places(head: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return the tensors themselves of rows and optimizer state, by their names in a checkpoint."""
    places: dict[str, Tensor] = {}
    for name, parameter in head.named_parameters():
        places[f"parameter.{name}"] = parameter
        for key in state_keys(optimizer) if optimizer and parameter.requires_grad else ():
            assert optimizer is not None
            places[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    return places


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UserError naming it if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot read: {error}") from None
