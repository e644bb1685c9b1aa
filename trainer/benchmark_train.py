"""What a step of training costs on this machine: whole, and beside the plain loop that people write.

The learning rate is 0: the work is the same, and the loss stays that of the first weights, so that both ways
can be seen to compute the same. Legend: N images of this rank, K classes, D width of the embedding.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.backbone import Backbone, build_backbone, image_size_of
from trainer.benchmark import in_turn
from trainer.collectives import sum_over
from trainer.config import Config
from trainer.data import Batch
from trainer.distributed import World, require_memory
from trainer.engine import compute_dtype
from trainer.errors import UserError
from trainer.feed import build_batches, open_training_data, require_same_data, with_derived_fields
from trainer.head import ClassShard, initial_centroids
from trainer.joint import StepOutput
from trainer.optimizer import build_optimizer, parameter_groups
from trainer.scale import scale_of
from trainer.state import build_state
from trainer.update import build_update

_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """One measurement: a recipe, how many steps, and whether the plain loop takes its turn."""

    config: Config
    steps: int
    against: str | None = None


def measure_training(case: TrainCase, world: World) -> dict[str, Any]:
    """Return the figures of one case; every rank must call it, each gets the same. Raises UserError.

    Times are medians of the slowest rank. First whole steps, reading included; then one batch again and
    again: our update, forward and backward of the bare backbone, and the plain loop, in turn.
    """
    data = open_training_data(case.config)
    config = with_derived_fields(case.config, data)
    require_same_data(config, data, world)
    if case.against and config.loss.name != "coco":
        raise UserError(f"--against plain: computes the COCO loss, not loss.name={config.loss.name}")
    state = build_state(config, world)
    update = build_update(state, config, data, world)
    with closing(build_batches(config, data, world, state.position)) as batches:
        last = [next(batches)[0]]

        def whole_step() -> StepOutput:
            out = update(last[0], 0.0)
            state.step += 1
            return out

        def read() -> None:
            last[0] = next(batches)[0]

        for _ in range(_WARM_UP):
            whole_step()
        seconds = in_turn({"data": read, "step": whole_step}, case.steps, world)
    batch, step_seconds = last[0], seconds["data"] + seconds["step"]
    dtype = getattr(torch, compute_dtype(config, world))
    bare = build_backbone(config.backbone, None).to(world.device)
    timed: dict[str, Callable[[], object]] = {
        "update": whole_step,
        "backbone": partial(_forward_backward, bare, batch, dtype, world),
    }
    result: dict[str, Any] = {}
    if case.against:
        plain = PlainLoop(config, dtype, world)
        timed["plain"] = partial(plain.step, batch)
        result["plain_loss"] = plain.step(batch)
    result["loss"] = float(whole_step().metrics["loss"])
    seconds |= in_turn(timed, case.steps, world)
    if case.against:
        result |= {"plain_seconds": seconds["plain"], "speedup": seconds["plain"] / seconds["update"]}
    return {
        **_settings(config, world),
        "dim": bare.dim,
        "step_seconds": step_seconds,
        "images_per_second": config.data.batch_size / step_seconds,
        "data_wait_fraction": seconds["data"] / step_seconds,
        "update_seconds": seconds["update"],
        "backbone_seconds": seconds["backbone"],
        "update_over_backbone": seconds["update"] / seconds["backbone"],
        **result,
        "peak_memory_bytes": world.peak_memory_bytes,
    }


def _settings(config: Config, world: World) -> dict[str, Any]:
    """Return what was measured, and on what."""
    return {
        "name": "train",
        "backbone": config.backbone.name,
        "image_size": image_size_of(config.backbone),
        "loss_name": config.loss.name,
        "classes": config.head.num_classes,
        "global_batch": config.data.batch_size,
        "ranks": world.size,
        "dtype": compute_dtype(config, world),
        "zero_stage": config.engine.zero_stage,
        "workers": config.data.workers,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
    }


def _forward_backward(backbone: Backbone, batch: Batch, dtype: torch.dtype, world: World) -> None:
    """Go once through the network and back: what no trainer can leave out."""
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        embeddings_ND = backbone(batch.images_NCHW.to(world.device))
    embeddings_ND.float().sum().backward()
    backbone.zero_grad()


class PlainLoop:
    """Every rank has all centroids; DistributedDataParallel, torch's cross-entropy, clipping and optimizer.

    The same first weights as ours. Batch norm looks at the images of a rank: on several ranks its loss is not
    quite ours.
    """

    def __init__(self, config: Config, dtype: torch.dtype, world: World) -> None:
        assert config.head.num_classes is not None
        torch.manual_seed(config.seed)
        model: nn.Module = _AllCentroids(config, config.head.num_classes, world)
        groups = parameter_groups(model, config.optim.weight_decay)
        for group in groups:
            group["lr"] = 0.0
        self.optimizer = build_optimizer(config.optim, groups)
        self.model = DistributedDataParallel(model, process_group=world.group) if world.size > 1 else model
        self.accumulation, self.clip_norm = config.engine.accumulation_steps, config.optim.clip_norm
        self.dtype, self.world = dtype, world

    def step(self, batch: Batch) -> float:
        """Train on this rank's images; return the mean loss over all ranks, the same on each."""
        device, total = self.world.device, torch.zeros((), device=self.world.device)
        for images_NCHW, labels_N in zip(
            batch.images_NCHW.chunk(self.accumulation), batch.labels_N.chunk(self.accumulation), strict=True
        ):
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                z_NK = self.model(images_NCHW.to(device))
            loss = F.cross_entropy(z_NK.float(), labels_N.to(device)) / self.accumulation
            loss.backward()
            total += loss.detach()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(sum_over(total, self.world.group)) / self.world.size


class _AllCentroids(nn.Module):
    """Images to the logits of all classes."""

    def __init__(self, config: Config, num_classes: int, world: World) -> None:
        super().__init__()
        backbone = build_backbone(config.backbone, None)
        what = f"--against plain: {num_classes} x {backbone.dim} on every rank"
        require_memory(num_classes * backbone.dim * 4 * 5, world, what)  # gradient, moments, normalised copy
        self.backbone = backbone.to(world.device)
        rows_KD = initial_centroids(config.seed, ClassShard(0, num_classes, num_classes), backbone.dim)
        self.centroids_KD = nn.Parameter(rows_KD.to(world.device))
        self.scale = scale_of(config.head.scale, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_ND = F.normalize(self.backbone(images_NCHW).float())
        return self.scale * features_ND @ F.normalize(self.centroids_KD).T
