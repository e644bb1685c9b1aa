"""Checkpoints: what a run is made of, written whole or not at all, read on any number of ranks.

::

    runs/NAME/checkpoints/step-00000400/
        state.json             step, data position, numbers of optimizer and loss scaler, the configuration
        backbone.safetensors   parameters, buffers and optimizer state, full tensors in float32
        head-00000.safetensors rows of rank 0, their optimizer state, and which rows they are
        head-00001.safetensors ...

Everything is written into ``.tmp-step-...`` and renamed once all ranks are done, so a folder called
``step-...`` is complete. Only safetensors and JSON are read: nothing in a checkpoint can run code.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from trainer.collectives import from_main, wait_for_all
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.optimizer import set_steps_taken, state_keys

FORMAT = 1
_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run folder. Every rank of ``group`` must make the same calls."""

    def __init__(self, folder: Path, keep_last: int, group: ProcessGroup) -> None:
        self.folder, self.keep_last, self.group = folder, keep_last, group

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, the same on every rank: rank 0 looks and tells."""
        found = complete_checkpoints(self.folder) if self.group.rank() == 0 else []
        return from_main(found[-1] if found else None, self.group)

    def save(
        self,
        step: int,
        record: dict[str, Any],
        backbone: dict[str, Tensor],
        head: dict[str, Tensor],
        shard: ClassShard,
    ) -> Path:
        """Write one checkpoint and drop those beyond ``keep_last``; return its folder on every rank.

        Rank 0 writes ``record`` as state.json, and ``backbone``; every rank its own rows, ``head``.
        """
        rank = self.group.rank()
        final = self.folder / f"{_PREFIX}{step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait_for_all(self.group)
        rows = {"start": str(shard.start), "stop": str(shard.stop), "num_classes": str(shard.num_classes)}
        _write_tensors(temporary / f"head-{rank:05d}.safetensors", head, rows)
        if rank == 0:
            _write_tensors(temporary / "backbone.safetensors", backbone, {})
            _write_json(temporary / "state.json", {"format": FORMAT, "step": step, **record})
        wait_for_all(self.group)
        if rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(self.folder)
            for old in complete_checkpoints(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        wait_for_all(self.group)
        return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints below ``folder``, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def read_record(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises UserError if it is none, or of another format."""
    try:
        record = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a checkpoint: state.json holds no object")
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {record.get('format')}, this version reads {FORMAT}")
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file. Raises UserError naming the file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_rows(path: Path, shard: ClassShard) -> dict[str, Tensor]:
    """Return the head's tensors for the classes of ``shard``, from however many ranks wrote them.

    Reads only the rows asked for. Raises UserError if the checkpoint has other classes.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for part in sorted(path.glob("head-*.safetensors")):
        with _opened(part) as file:
            rows = {key: int(value) for key, value in (file.metadata() or {}).items()}
            if rows.keys() != {"start", "stop", "num_classes"}:
                raise UserError(f"{part}: does not say which rows of the head it holds")
            if rows["num_classes"] != shard.num_classes:
                raise UserError(
                    f"{path}: holds {rows['num_classes']} classes, this run has {shard.num_classes}"
                )
            low, high = max(rows["start"], shard.start), min(rows["stop"], shard.stop)
            if low < high:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    values = file.get_slice(name)[low - rows["start"] : high - rows["start"]]
                    parts.setdefault(name, []).append((low, values))
    whole = {name: torch.cat([v for _, v in sorted(p, key=lambda x: x[0])]) for name, p in parts.items()}
    if not whole or any(len(values) != len(shard) for values in whole.values()):
        raise UserError(f"{path}: rows {shard.start} to {shard.stop} of the head are not all there")
    return whole


def head_tensors(head: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's rows and their optimizer state; the first dimension of each is the class."""
    tensors = {}
    for name, parameter in head.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach().cpu()
        for key in state_keys(optimizer) if parameter.requires_grad else ():
            tensors[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key].detach().cpu()
    return tensors


@torch.no_grad()
def load_head(
    head: nn.Module, optimizer: Optimizer | None, tensors: dict[str, Tensor], steps: int = 0
) -> None:
    """Set what ``head_tensors`` returned; without an optimizer only the rows. Raises UserError."""
    for name, parameter in head.named_parameters():
        if f"parameter.{name}" not in tensors:
            raise UserError(f"loss.name, loss.extra: checkpoint of another loss: it has no {name}")
        parameter.copy_(tensors[f"parameter.{name}"])
        for key in state_keys(optimizer) if optimizer and parameter.requires_grad else ():
            assert optimizer is not None
            optimizer.state[parameter][key].copy_(tensors[f"optimizer.{key}.{name}"])
    if optimizer:
        set_steps_taken(optimizer, steps)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UserError naming it if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot read: {error}") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    _sync(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    """Make the file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
