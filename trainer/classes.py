"""Other classes for a checkpoint: new ones get a row, dropped and merged ones lose theirs, names decide.

Every new label has some old rows as its sources: one (it stays, to the bit, with its optimizer's state),
several (merged: the mean direction, of their mean length), or none (new: the mean feature of its images).
The old rows are streamed, and every rank keeps those of its new classes only.

Legend: K old classes, C new classes of this rank, D width of the embedding.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.checkpoint import Contents
from trainer.class_means import centroids_at, class_means, only_classes
from trainer.config import Config, to_dict
from trainer.distributed import World, joined_world
from trainer.errors import UserError
from trainer.feed import fingerprint_of
from trainer.head import ClassShard, initial_rows
from trainer.index import Index, open_index
from trainer.log import CLASSES
from trainer.options import dump
from trainer.saving import Checkpoints
from trainer.trained import Trained, open_trained, rows_name

COMMANDS = ("grow", "drop", "merge", "remap")
_TYPICAL = ("exp_avg_sq", "square_sum")  # of a new row as of the others, or its first steps would be too long


@dataclass(frozen=True)
class Change:
    """Which class of the new data each old class is."""

    new_of_old_K: NDArray[np.int64]
    """-1 for a class that is dropped."""
    is_new: NDArray[np.bool_]
    """Of every new label: no old class is it."""

    @property
    def num_dropped(self) -> int:
        """Old classes that are no more."""
        return int((self.new_of_old_K < 0).sum())

    @property
    def num_merged(self) -> int:
        """Old classes that share a new one with another."""
        sharing = np.bincount(self.new_of_old_K[self.new_of_old_K >= 0], minlength=len(self.is_new))
        return int(sharing[sharing > 1].sum())


def change_classes(
    command: str,
    path: Path,
    data: Path,
    out: Path,
    *,
    renames: Mapping[str, str] | None = None,
    new_rows: str = "mean",
) -> dict[str, Any]:
    """Write the run folder ``out`` with a checkpoint of ``path`` for the classes of ``data``; summarise.

    ``renames``: old name -> new name; several may go to one. ``new_rows``: "mean" feature of the class's
    images, or "random" by the seed. Every rank must call it. Raises UserError.
    """
    trained = open_trained(path)
    index = open_index(data, "NEW_DATA")
    change = match(command, trained.class_names, index.class_names, renames or {}, str(data))
    config = config_for(trained.config, index, out)
    with joined_world(config.engine.timeout_seconds) as world:
        written = write_changed(trained, change, config, index, world, new_rows)
    return {
        "checkpoint": str(written),
        "classes": index.num_classes,
        "new": int(change.is_new.sum()),
        "dropped": change.num_dropped,
        "merged": change.num_merged,
    }


def match(
    command: str, old_names: Sequence[str], new_names: Sequence[str], renames: Mapping[str, str], data: str
) -> Change:
    """Match classes by name. Raises UserError for what ``command`` does not do, naming a class."""
    if not (old_names and new_names):
        raise UserError(
            f"{command}: classes are matched by name, and {data} or the checkpoint has numbers only"
        )
    stranger = next((name for name in renames if name not in set(old_names)), None)
    if stranger is not None:
        raise UserError(f"--map: {stranger!r} is not a class of the checkpoint")
    label_of = {name: label for label, name in enumerate(new_names)}
    new_of_old_K = np.array([label_of.get(renames.get(name, name), -1) for name in old_names])
    counts = np.bincount(new_of_old_K[new_of_old_K >= 0], minlength=len(new_names))
    change = Change(new_of_old_K, counts == 0)
    if change.is_new.all():
        raise UserError(f"{command}: {data} has no class of the checkpoint")
    if command in ("grow", "merge") and change.num_dropped:
        lost = old_names[int(np.argmax(new_of_old_K < 0))]
        raise UserError(
            f"{command}: {data} lacks class {lost!r} of the checkpoint; drop or remap can lose it"
        )
    if command in ("drop", "merge") and change.is_new.any():
        added = new_names[int(np.argmax(change.is_new))]
        raise UserError(f"{command}: class {added!r} of {data} is new; grow or remap can add it")
    if command in ("grow", "drop") and change.num_merged:
        raise UserError(f"{command}: --map merges {change.num_merged} classes; merge or remap can do it")
    return change


def config_for(config: Config, index: Index, out: Path) -> Config:
    """Return the configuration that trains on from ``out``. Raises UserError."""
    if out.exists():
        raise UserError(f"--out: {out} exists already")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", out.name):
        raise UserError(f"--out: {out.name!r} cannot be the name of a run")
    if index.num_classes < 2:
        raise UserError(f"{index.field}: {index.folder} has one class, and a head has two or more")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, root=out.parent, name=out.name),
        data=dataclasses.replace(config.data, train=index.folder),
        head=dataclasses.replace(config.head, num_classes=index.num_classes),
        checkpoint=dataclasses.replace(config.checkpoint, resume="auto"),
    )


def write_changed(
    trained: Trained, change: Change, config: Config, index: Index, world: World, new_rows: str
) -> Path:
    """Write the changed checkpoint into the run folder of ``config``; every rank must call it."""
    shard = ClassShard.of_rank(index.num_classes, world.rank, world.size)
    rows = change_rows(trained, change, shard, config, index, world, new_rows)
    record = {key: value for key, value in trained.record.items() if key not in ("format", "step")}
    record |= {
        "position": {"epoch": int(record["position"]["epoch"]) + 1, "consumed": 0},
        "data_fingerprint": fingerprint_of(config, index),
        "config": to_dict(config),
    }
    out = config.run_folder
    contents = Contents(
        trained.record["step"],
        record,
        backbone=trained.read_backbone() if world.is_main else {},
        head=rows,
        shard=shard.times(config.head.sub_centroids),
        class_names=index.class_names,
    )
    written = Checkpoints(out / "checkpoints", config.checkpoint.keep_last, world.group).save(contents)
    if world.is_main:
        (out / "config.yaml").write_text(dump(config))
        (out / CLASSES).write_text(json.dumps(list(index.class_names)) + "\n")
    return written


@torch.no_grad()
def change_rows(
    trained: Trained,
    change: Change,
    shard: ClassShard,
    config: Config,
    index: Index,
    world: World,
    new_rows: str,
) -> dict[str, Tensor]:
    """Return the head's tensors, optimizer state included, for a shard of the new classes. Collective."""
    sub_centroids = config.head.sub_centroids
    gathered = _gather(trained, change, shard.times(sub_centroids), sub_centroids)
    is_new_C = torch.from_numpy(change.is_new[shard.start : shard.stop])
    dim = gathered.tensors[rows_name(gathered.tensors, config.loss.judge)].shape[1]
    directions = F.normalize(initial_rows(config.seed, shard.times(sub_centroids), dim))
    if new_rows == "mean" and change.is_new.any():
        backbone = trained.build_backbone().to(world.device)
        of_new = only_classes(index, change.is_new)
        means_CD, counts_C = class_means(backbone, of_new, shard, dim, config, world)
        has_images = (counts_C > 0).repeat_interleave(sub_centroids).cpu()
        means = centroids_at(means_CD, sub_centroids, config.seed, shard).cpu()
        directions = torch.where(has_images[:, None], means, directions)
    is_new = is_new_C.repeat_interleave(sub_centroids)
    for name, length in gathered.mean_lengths.items():
        rows = gathered.tensors[name]
        rows[is_new] = (directions[is_new] * length).to(rows.dtype)
    for name, value in gathered.means.items():
        gathered.tensors[name][is_new] = value.to(gathered.tensors[name].dtype)
    return gathered.tensors


@dataclass
class _Gathered:
    tensors: dict[str, Tensor]
    """Of this rank's new classes; new ones are zero so far."""
    mean_lengths: dict[str, float]
    """Of the old rows of every matrix: a sum of losses has several."""
    means: dict[str, Tensor]
    """Over the old rows, of what a new one shall have like the others."""


def _gather(trained: Trained, change: Change, row_shard: ClassShard, sub_centroids: int) -> _Gathered:
    """Stream the old rows; keep those of ``row_shard``, merged ones as means. Communicates nothing."""
    classes = torch.from_numpy(change.new_of_old_K)
    new_rows = classes.repeat_interleave(sub_centroids) * sub_centroids
    new_rows += torch.arange(sub_centroids).repeat(len(classes))
    is_kept = classes.repeat_interleave(sub_centroids) >= 0
    counts = torch.bincount(new_rows[is_kept], minlength=row_shard.num_classes)
    counts = counts[row_shard.start : row_shard.stop]
    is_merged = counts > 1
    tensors: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    length_sums: dict[str, float] = {}
    lengths: dict[str, Tensor] = {}
    for low, block in trained.stream_rows():
        places = new_rows[low : low + len(next(iter(block.values())))] - row_shard.start
        own = is_kept[low : low + len(places)] & (places >= 0) & (places < len(row_shard))
        into = places[own]
        for name, values in block.items():
            if name.startswith(tuple(f"optimizer.{key}." for key in _TYPICAL)) or values.ndim == 1:
                sums[name] = sums.get(name, 0) + values.double().sum(0)
            own_values = values[own]
            if _is_matrix(name, values):  # merged ones by direction, each counting the same
                block_lengths = torch.linalg.vector_norm(values.float(), dim=1)
                length_sums[name] = length_sums.get(name, 0.0) + float(block_lengths.double().sum())
                lengths.setdefault(name, torch.zeros(len(row_shard))).index_add_(0, into, block_lengths[own])
                unit = F.normalize(own_values.float()).to(values.dtype)
                own_values = torch.where(is_merged[into, None], unit, own_values)
            target = tensors.setdefault(name, values.new_zeros(len(row_shard), *values.shape[1:]))
            target.index_add_(0, into, own_values)
    for name, target in tensors.items():
        divisor = counts[is_merged].view(-1, *[1] * (target.ndim - 1))
        if name in lengths:
            merged = F.normalize(target[is_merged].float())
            target[is_merged] = (merged * (lengths[name][is_merged, None] / divisor)).to(target.dtype)
        else:
            target[is_merged] = target[is_merged] / divisor
    means = {name: total / trained.num_rows for name, total in sums.items()}
    return _Gathered(tensors, {name: x / trained.num_rows for name, x in length_sums.items()}, means)


def _is_matrix(name: str, values: Tensor) -> bool:
    """Tell rows from their biases and from the optimizer's state."""
    return name.startswith("parameter.") and values.ndim > 1
