"""A trained model as it lies on disk: the checkpoint that a path means, its backbone, its rows as a stream.

For everything that is done with a model after training, in one process and without DeepSpeed.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.backbone import Backbone, build_backbone
from trainer.checkpoint import complete_checkpoints, read_record, read_rows, read_tensors
from trainer.config import Config, InvalidConfigError, from_dict
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.log import CLASSES

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

    def build_backbone(self) -> Backbone:
        """Build the backbone with its trained weights, ready to embed. Raises UserError."""
        config = dataclasses.replace(self.config.backbone, pretrained=False, gradient_checkpointing=False)
        backbone = build_backbone(config, group=None)
        weights = backbone_weights(read_tensors(self.path / "backbone.safetensors"))
        try:
            backbone.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self.path}: of another model: {' '.join(str(error).split())}") from None
        return backbone.eval()

    def stream_rows(self, block: int = BLOCK_ROWS) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (first row, the head's tensors of some rows), in order; ``block`` rows at a time."""
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
    record = read_record(checkpoint)
    try:
        config = from_dict(record["config"])
    except (InvalidConfigError, KeyError):
        raise UserError(f"{checkpoint}: its configuration is not one of this version") from None
    if "class_names" in record:
        return Trained(checkpoint, run_folder, record, config, tuple(record["class_names"]))
    try:  # before checkpoints had the names, only their run had them
        names = json.loads((run_folder / CLASSES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run_folder / CLASSES}: cannot read the names of the classes: {error}") from None
    return Trained(checkpoint, run_folder, record, config, tuple(names))


def backbone_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's ``state_dict`` from the tensors of a checkpoint, without the optimizer's."""
    return {
        name.partition(".")[2]: value
        for name, value in tensors.items()
        if name.startswith(("parameter.", "buffer."))
    }


def rows_name(tensors: dict[str, Tensor]) -> str:
    """Return the name of the tensor that holds the rows of a head, whichever head it is."""
    (name,) = (name for name, value in tensors.items() if name.startswith("parameter.") and value.ndim > 1)
    return name
