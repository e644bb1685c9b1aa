"""The run sheet: what a run is about to do, before it spends the first hour on it."""

import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

from trainer.backbone import image_size_of
from trainer.cache import describe_source
from trainer.config import Config
from trainer.distributed import World
from trainer.engine import compute_dtype
from trainer.feed import TrainingData
from trainer.index import Index
from trainer.losses.weighted_sum import WeightedSum
from trainer.state import head_bytes, head_types


def run_sheet(config: Config, world: World, data: TrainingData, head: Any, start_step: int) -> dict[str, str]:
    """Return title -> text of every line; the head's line is of this rank."""
    optim, dim = config.optim, next(head.parameters()).shape[1]
    engine, batch = config.engine, config.data.batch_size
    side = image_size_of(config.backbone)
    micro_batch = batch // (world.size * engine.accumulation_steps)
    index = data.index if isinstance(data.index, Index) else None
    sheet = {
        "run": str(config.run_folder),
        "ranks": f"{world.size} on {world.device.type}, {world.local_size} on this host",
        "backbone": f"{config.backbone.name}, {compute_dtype(config, world)}, ZeRO {engine.zero_stage}",
        "pixels": f"{config.backbone.channels} x {side} x {side}, to which images are brought",
        "head": f"{config.loss.name}, {head.shard.num_classes} classes x {dim}" + _how(config, head, world),
        "head per rank": f"{len(head.shard)} classes, "
        f"{head_bytes(config, len(head.shard), dim) / 2**20:.1f} MiB with optimizer state",
        "data": f"{data.num_samples} images, {data.num_classes} classes",
        "data source": describe_source(config.data.train, index, config.data)
        + "".join(f", and {weight:g} of {place} for each" for place, weight in config.data.mix.items()),
        "data fingerprint": data.fingerprint[:12],
        "global batch": f"{batch} images = {world.size} ranks x {engine.accumulation_steps} x {micro_batch}",
        "steps": f"{start_step} to {optim.steps or 0}, {data.num_samples // batch} per epoch",
        "test sets": ", ".join([*config.eval.classification, *config.eval.verification]) or "none",
        "optimizer": f"{optim.name}, peak lr {optim.lr:g}, {optim.schedule}",
        "warm-up": f"{optim.warmup_steps} steps",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "deepspeed", "timm", "webdataset"))
        + f", python {platform.python_version()}",
    }
    typed = [part for part in sys.argv if not part.startswith("--local_rank")]  # what a launcher adds
    sheet["command"] = shlex.join(typed)
    if engine.deepspeed_overrides:
        sheet["deepspeed overrides"] = str(engine.deepspeed_overrides)
    return sheet


def _how(config: Config, head: Any, world: World) -> str:
    """Return scale, way of updating and types of a head of cosines."""
    if isinstance(head, WeightedSum):
        return ", " + " + ".join(f"{weight:g} {name}" for name, weight in head.weights.items())
    if config.loss.name == "softmax":
        return ""
    text = f", scale {head.loss.scale:.4g}, {config.head.update}"
    if config.head.update == "fused":
        rows, products = (str(dtype).removeprefix("torch.") for dtype in head_types(config, world))
        text += f", rows {rows}, products {products}"
    return text


def as_text(sheet: dict[str, str]) -> str:
    """Return the sheet as aligned lines."""
    width = max(map(len, sheet))
    return "\n".join(f"  {title:<{width}}  {text}" for title, text in sheet.items())
