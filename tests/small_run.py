"""A run folder as training leaves it, without the training: random weights, random statistics, real files."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from trainer.backbone import Backbone, build_backbone
from trainer.checkpoint import Contents
from trainer.config import Config, from_dict, to_dict
from trainer.head import ClassShard, initial_rows
from trainer.index import Index, open_index
from trainer.options import dump
from trainer.saving import Checkpoints
from trainer.shards import write_shards
from trainer.sources import image_folder, shuffled


def pack_photos(root: Path, name: str, classes: dict[str, int], size: tuple[int, int] = (40, 40)) -> Path:
    """Pack so many crops of two real photographs for every class; a class is a place in one of them."""
    from sklearn.datasets import load_sample_images  # which ranks need not import

    photos = load_sample_images().images
    generator = np.random.default_rng(3)
    for label, count in classes.items():
        places = np.random.default_rng(sum(label.encode()))
        photo = photos[places.integers(len(photos))]
        y, x = places.integers(0, photo.shape[0] - 60), places.integers(0, photo.shape[1] - 60)
        for i in range(count):
            dy, dx = generator.integers(0, 4, 2)
            crop = photo[y + dy : y + dy + size[0], x + dx : x + dx + size[1]]
            path = root / f"{name}-images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop).save(path)
    source = image_folder(root / f"{name}-images")
    write_shards(shuffled(source), root / name, source.class_names)
    return root / name


def make_run(
    folder: Path,
    data: Path,
    *,
    name: str = "run",
    step: int = 7,
    backbone_name: str = "resnet10t",
    loss: str = "coco",
    matrices: Sequence[str] = ("centroids_CD",),
    **backbone: Any,
) -> Path:
    """Write a run of one rank on a packed data set and return its folder; ``loss`` has ``matrices``."""
    index = open_index(data, "data.train")
    config = from_dict(
        {
            "data": {"train": data, "batch_size": 4, "workers": 0},
            "run": {"root": folder, "name": name},
            "backbone": {"name": backbone_name, "image_size": 32, "neck": "bn_linear_bn", "embedding_dim": 12}
            | backbone,
            "loss": {"name": loss},
            "head": {"num_classes": index.num_classes},
            "optim": {"name": "adamw", "steps": step, "lr": 0.01},
            "engine": {"dtype": "float32"},
            "log": {"wandb": "disabled", "every_steps": 1},
            "eval": {"classification": {"same": data}, "verification": {"pairs": data}, "batch_size": 8},
        }
    )
    save_checkpoint(config, index, step, matrices)
    run = config.run_folder
    (run / "config.yaml").write_text(dump(config))
    (run / "classes.json").write_text(json.dumps(list(index.class_names)))
    (run / "done.json").write_text(json.dumps({"step": step, "eval/same/accuracy": 0.75}))
    lines = [{"step": i + 1, "train/loss": 3.0 / (i + 1), "train/lr": 0.01} for i in range(step)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def random_backbone(config: Config, seed: int = 5) -> Backbone:
    """Build a backbone whose running statistics, too, are those of no fresh one."""
    torch.manual_seed(seed)
    backbone = build_backbone(config.backbone, group=None)
    for tensor_name, buffer in backbone.named_buffers():
        if tensor_name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif tensor_name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    for parameter in backbone.neck.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return backbone.eval()


def save_checkpoint(config: Config, index: Index, step: int, matrices: Sequence[str]) -> Path:
    """Save a checkpoint of one rank with random weights, rows (of each matrix) and optimizer state."""
    backbone = random_backbone(config)
    state = backbone.state_dict(keep_vars=True)
    generator = torch.Generator().manual_seed(6)
    keys = ("exp_avg", "exp_avg_sq")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        is_parameter = isinstance(value, torch.nn.Parameter)
        tensors[f"parameter.{name}" if is_parameter else f"buffer.{name}"] = value.detach()
        for key in keys if is_parameter else ():
            tensors[f"optimizer.{key}.{name}"] = torch.zeros(value.shape)
    shard = ClassShard(0, index.num_classes, index.num_classes)
    rows = {}
    for i, matrix in enumerate(matrices):
        rows[f"parameter.{matrix}"] = initial_rows(9 + i, shard, backbone.dim) * (1.7 + i)
        for key in keys:
            rows[f"optimizer.{key}.{matrix}"] = torch.rand(len(shard), backbone.dim, generator=generator)
    record = {
        "position": {"epoch": 2, "consumed": 4},
        "numbers": {"optimizer_steps": step},
        "loss": {},
        "data_fingerprint": index.fingerprint,
        "config": to_dict(config),
    }
    if dist.is_initialized():  # left by a run that failed in this process
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        group = dist.distributed_c10d._get_default_group()
        return Checkpoints(config.run_folder / "checkpoints", 2, group).save(
            Contents(step, record, tensors, rows, shard, index.class_names)
        )
    finally:
        dist.destroy_process_group()


def with_run(config: Config, **changes: Any) -> Config:
    """Return the configuration with some sections changed: ``with_run(config, optim={"steps": 9})``."""
    return dataclasses.replace(
        config,
        **{section: dataclasses.replace(getattr(config, section), **new) for section, new in changes.items()},
    )
