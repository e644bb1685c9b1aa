"""A trained model as it lies on disk: the checkpoint that a path means, its backbone, its rows as a stream.

For everything that is done with a model after training, in one process and without DeepSpeed.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import manifest
from trainer.backbone import Backbone, build_backbone
from trainer.checkpoint import read_rows, read_tensors
from trainer.config import Config, InvalidConfigError, from_dict
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.log import CLASSES
from trainer.manifest import complete_checkpoints, read_record

BLOCK_ROWS = 16384


@dataclass(frozen=True)
class Trained:
    """One complete checkpoint, and what it says about itself."""

    path: Path
    run_folder: Path
    """The run that made it."""
    record: dict[str, Any]
    config: Config
    class_names: tuple[str, ...]
    """Name of every label; empty if the data had numbers only."""

    @property
    def num_classes(self) -> int:
        """Classes of the head."""
        assert self.config.head.num_classes is not None
        return self.config.head.num_classes

    @property
    def num_rows(self) -> int:
        """Rows of the head: ``head.sub_centroids`` for each class, one after another."""
        return self.num_classes * self.config.head.sub_centroids

    def read_backbone(self) -> dict[str, Tensor]:
        """Return the backbone's tensors and their optimizer's. Raises UserError if they are damaged."""
        manifest.verify(self.path, "backbone*")
        return read_tensors(self.path / "backbone.safetensors")

    def build_backbone(self) -> Backbone:
        """Build the backbone with its trained weights, ready to embed. Raises UserError."""
        config = dataclasses.replace(self.config.backbone, pretrained=False, gradient_checkpointing=False)
        backbone = build_backbone(config, group=None)
        weights = backbone_weights(self.read_backbone())
        try:
            backbone.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self.path}: of another model: {' '.join(str(error).split())}") from None
        return backbone.eval()

    def stream_rows(self, block: int = BLOCK_ROWS) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (first row, the head's tensors of some rows), in order; ``block`` rows at a time.

        Raises UserError if they are damaged.
        """
        manifest.verify(self.path, "head-*")
        for low in range(0, self.num_rows, block):
            high = min(low + block, self.num_rows)
            yield low, read_rows(self.path, ClassShard(low, high, self.num_rows))


def open_trained(path: Path) -> Trained:
    """Open a checkpoint, or the newest one of a run folder. Raises UserError naming what is missing."""
    if not path.is_dir():
        raise UserError(f"{path}: neither a run folder nor a checkpoint")
    if (path / "state.json").is_file():
        checkpoint, run_folder = path, path.resolve().parents[1]
    else:
        found = complete_checkpoints(path / "checkpoints")
        if not found:
            raise UserError(f"{path}: holds no complete checkpoint")
        checkpoint, run_folder = found[-1], path
    manifest.verify(checkpoint, "*.json")
    record = read_record(checkpoint)
    try:
        config = from_dict(record["config"])
    except (InvalidConfigError, KeyError):
        raise UserError(f"{checkpoint}: its configuration is not one of this version") from None
    names = next((f / CLASSES for f in (checkpoint, run_folder) if (f / CLASSES).is_file()), None)
    if names is None:
        raise UserError(f"{run_folder / CLASSES}: is missing, so the names of the classes are not known")
    return Trained(checkpoint, run_folder, record, config, tuple(json.loads(names.read_text())))


def backbone_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's ``state_dict`` from the tensors of a checkpoint, without the optimizer's."""
    return {
        name.partition(".")[2]: value
        for name, value in tensors.items()
        if name.startswith(("parameter.", "buffer."))
    }


def rows_name(tensors: dict[str, Tensor], judge: str) -> str:
    """Return the name of the tensor that holds the rows of a head, ``judge`` being ``config.loss.judge``.

    Other terms of a loss may hold matrices too, and so does a classifier over trained centres.
    """
    names = [name for name, value in tensors.items() if name.startswith("parameter.") and value.ndim > 1]
    if len(names) > 1:
        names = [n for n in names if n.startswith(f"parameter.parts.{judge}.") and ".classifier." not in n]
    (name,) = names
    return name


def describe(trained: Trained) -> dict[str, Any]:
    """Return what a checkpoint is, without reading its tensors."""
    config, record = trained.config, trained.record
    return {
        "checkpoint": str(trained.path),
        "format": record["format"],
        "step": record["step"],
        "epoch": record["position"]["epoch"],
        "backbone": config.backbone.name,
        "loss": config.loss.name,
        "classes": trained.num_classes,
        "rows": trained.num_rows,
        "first_classes": list(trained.class_names[:5]),
        "data": str(config.data.train),
        "data_fingerprint": record["data_fingerprint"],
        "files": {path.name: path.stat().st_size for path in sorted(trained.path.iterdir())},
    }


def verify(trained: Trained) -> dict[str, int]:
    """Read every tensor; return how many numbers there are. Raises UserError naming what is not whole.

    Files have to be as they were written, all rows have to be there, and every number has to be finite.
    """
    numbers = {"backbone": 0, "head": 0}
    for name, value in trained.read_backbone().items():
        _require_finite(trained.path, name, value)
        numbers["backbone"] += value.numel()
    for low, tensors in trained.stream_rows():
        for name, value in tensors.items():
            _require_finite(trained.path, f"{name} from row {low} on", value)
            numbers["head"] += value.numel()
    return numbers


def _require_finite(path: Path, name: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {name} holds a number that is not finite")
