"""The run sheet: what a run is about to do, before it spends the first hour on it."""

import platform
from importlib.metadata import version
from typing import Any

from trainer.config import Config
from trainer.distributed import World
from trainer.engine import compute_dtype
from trainer.index import Index


def run_sheet(config: Config, world: World, index: Index, head: Any, start_step: int) -> dict[str, str]:
    """Return title -> text of every line; the head's line is of this rank."""
    optim, rows = config.optim, next(head.parameters())
    engine, batch = config.engine, config.data.batch_size
    micro_batch = batch // (world.size * engine.accumulation_steps)
    state_tensors = 2 if optim.name == "adamw" else int(optim.momentum > 0)
    head_bytes = sum(p.numel() * p.element_size() for p in head.parameters()) * (1 + state_tensors)
    sheet = {
        "run": str(config.run_folder),
        "ranks": f"{world.size} on {world.device.type}, {world.local_size} on this host",
        "backbone": f"{config.backbone.name}, {compute_dtype(config, world)}, ZeRO {engine.zero_stage}",
        "head": f"{config.loss.name}, {head.shard.num_classes} classes x {rows.shape[1]}"
        + (f", scale {head.scale:.4g}" if config.loss.name == "coco" else ""),
        "head per rank": f"{len(head.shard)} classes, {head_bytes / 2**20:.1f} MiB with optimizer state",
        "data": f"{index.num_samples} images, {index.num_classes} classes",
        "data fingerprint": index.fingerprint[:12],
        "global batch": f"{batch} images = {world.size} ranks x {engine.accumulation_steps} x {micro_batch}",
        "steps": f"{start_step} to {optim.steps or 0}, {index.num_samples // batch} per epoch",
        "test sets": ", ".join([*config.eval.classification, *config.eval.verification]) or "none",
        "optimizer": f"{optim.name}, peak lr {optim.lr:g}, {optim.schedule}",
        "warm-up": f"{optim.warmup_steps} steps",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "deepspeed", "timm", "webdataset"))
        + f", python {platform.python_version()}",
    }
    if engine.deepspeed_overrides:
        sheet["deepspeed overrides"] = str(engine.deepspeed_overrides)
    return sheet


def as_text(sheet: dict[str, str]) -> str:
    """Return the sheet as aligned lines."""
    width = max(map(len, sheet))
    return "\n".join(f"  {title:<{width}}  {text}" for title, text in sheet.items())
