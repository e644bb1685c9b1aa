"""Memory, checkpoints, traffic and time of a step for K classes on N GPUs, before renting them.

Memory of the head and bytes on the links follow from the shapes (``trainer/headcost.py``). The backbone is
counted by a forward pass without memory (torch's meta device). Seconds are bytes and operations divided by
the speeds of ``GPUS``, which are data sheets times a share that is usually reached: they rank alternatives,
and are within a factor of two at best. With a profile the head's seconds come from least squares over
measurements of the user's own machine; nothing else does. No second is hidden behind another.

Legend: B images of all ranks, K classes, D width, R ranks.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.backbone import build_backbone, image_size_of
from trainer.config import BackboneConfig
from trainer.errors import UserError
from trainer.headcost import BYTES, MOMENTS, HeadSpeed, HeadWork, Profile, speed_of
from trainer.machines import (
    GPUS,
    PASSES_OVER_ACTIVATIONS,
    RESERVE_BYTES,
    RESERVE_SHARE,
    SHARE_OF_LINK,
    SHARE_OF_MEMORY,
    SHARE_OF_TFLOPS,
)

_SLACK_OF_ACTIVATIONS = 1.15  # gradients that live for a moment in the backward pass


# ---------------------------------------------------------------------------------------------- backbone


@dataclass(frozen=True)
class BackboneCost:
    """A backbone with its neck, counted: nothing is measured."""

    name: str
    parameters: int
    forward_flop: float
    """Of an image; the backward pass is taken as twice that."""
    kept_bytes: dict[str, float]
    """What autograd keeps of an image, by compute type; attention as if it were not fused."""
    norm_inputs: int
    """Numbers of an image that enter a batch norm: a global one keeps them in float32."""
    norm_channels: int
    norm_layers: int


def count_backbone(name: str, image_size: int | None, dim: int) -> BackboneCost:
    """Count a network by its forward pass on shapes alone. Raises UserError for what timm does not know."""
    for option, value in (("--dim", dim), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value} is not above 0")
    config = BackboneConfig(name=name, image_size=image_size, embedding_dim=dim, batch_norm="local")
    with torch.device("meta"):
        backbone = build_backbone(config, None)  # type: ignore[arg-type]  # only global batch norms need one
    size = image_size_of(config)
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    parameters = sum(p.numel() for p in backbone.parameters())
    flop, entered, _ = _forward(backbone, norms, torch.zeros(2, 3, size, size, device="meta"))
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        kept_bytes = [
            _forward(backbone.to(dtype), norms, torch.zeros(n, 3, size, size, device="meta"))[2]
            for n in (2, 4)
        ]
        kept[str(dtype).removeprefix("torch.")] = (kept_bytes[1] - kept_bytes[0]) / 2  # without constants
    kept["float16"] = kept["bfloat16"]
    channels = sum(m.num_features for m in norms)
    return BackboneCost(name, parameters, flop / 2, kept, entered // 2, channels, len(norms))


def _forward(backbone: nn.Module, norms: Sequence[nn.Module], images_NCHW: Tensor) -> tuple[float, int, int]:
    """Return operations, numbers that enter ``norms`` and bytes kept for the backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes twice
    entered = 0

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal entered
        entered += inputs[0].numel()

    hooks = [norm.register_forward_pre_hook(enter) for norm in norms]
    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with FlopCounterMode(display=False) as counter, keeping:
        backbone(images_NCHW)
    for hook in hooks:
        hook.remove()
    own = {x.untyped_storage()._cdata for x in itertools.chain(backbone.parameters(), backbone.buffers())}
    return counter.get_total_flops(), entered, sum(s.nbytes() for key, s in kept.items() if key not in own)


# --------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and on what. Names are those of the command line."""

    classes: int
    dim: int
    batch: int
    """Images of one optimizer step, over all ranks and micro-batches."""
    nodes: int
    gpus_per_node: int
    gpu: str
    backbone: BackboneCost
    state_dtype: str = "float32"
    """Rows and their optimizer state."""
    optimizer: str = "sgd"
    """Of the rows. The backbone has the same, or SGD beside row_adagrad."""
    dtype: str = "auto"
    """Of the backbone; ``auto`` is bfloat16 where the device has it, else float32, as in training."""
    cache_mib: int | None = None
    accumulation_steps: int = 1
    profile: Profile | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "batch", "nodes", "gpus_per_node", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not above 0")
        if self.cache_mib is not None and self.cache_mib < 0:
            raise UserError(f"--cache-mib: {self.cache_mib} is below 0")
        check_gpu(self.gpu)
        if self.dtype != "auto" and self.dtype not in GPUS[self.gpu].tflops:
            raise UserError(f"--dtype: {self.gpu} does not compute in {self.dtype}")
        if self.classes < self.ranks:
            raise UserError(f"--classes: {self.classes} classes cannot be cut over {self.ranks} ranks")
        if self.batch % (self.ranks * self.accumulation_steps):
            parts = f"{self.ranks} ranks"
            if self.accumulation_steps > 1:
                parts += f" x --accumulation-steps {self.accumulation_steps}"
            raise UserError(f"--batch: {self.batch} is not divisible by {parts}")
        if self.profile is not None and (self.profile.device == "cpu") != (self.gpu == "cpu"):
            where = f"--profile {self.profile.path}"
            raise UserError(f"{where}: measured on {self.profile.device}, but --gpu is {self.gpu}")

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.gpus_per_node

    @property
    def local_batch(self) -> int:
        """Images that a rank holds at once."""
        return self.batch // (self.ranks * self.accumulation_steps)

    @property
    def compute_dtype(self) -> str:
        """The backbone's type, with "auto" decided."""
        if self.dtype != "auto":
            return self.dtype
        has_bfloat16 = self.gpu != "cpu" and "bfloat16" in GPUS[self.gpu].tflops
        return "bfloat16" if has_bfloat16 else "float32"

    @property
    def product_dtype(self) -> str:
        """What ``head.product_dtype`` should be: its "auto", but float32 where bfloat16 would be emulated."""
        wanted = "bfloat16" in (self.state_dtype, self.compute_dtype)
        return "bfloat16" if wanted and "bfloat16" in GPUS[self.gpu].tflops else "float32"

    @property
    def speed(self) -> HeadSpeed:
        """Of the head: measured, or by the data sheet. Raises UserError for a type that was not measured."""
        if self.profile is None:
            return speed_of(self.gpu, self.product_dtype)
        if self.product_dtype not in self.profile.speeds:
            raise UserError(f"--profile {self.profile.path}: no line has dtype {self.product_dtype}")
        return self.profile.speeds[self.product_dtype]

    @property
    def head(self) -> HeadWork:
        """A rank's part of the head, for one micro-batch."""
        turns = 1.0 if self.profile is None else max(1.0, self.gpus_per_node / self.profile.processors)
        return HeadWork(
            classes=self.classes, dim=self.dim, batch=self.batch // self.accumulation_steps, ranks=self.ranks,
            state_dtype=self.state_dtype, product_dtype=self.product_dtype, optimizer=self.optimizer,
            on_cpu=self.gpu == "cpu", cache_bytes=None if self.cache_mib is None else self.cache_mib << 20,
            turns=turns if self.gpu == "cpu" else 1.0,
        )  # fmt: skip


def check_gpu(name: str) -> None:
    """Raise UserError, with the names there are, for a device that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu: unknown {name!r}; one of {', '.join(GPUS)}")


# -------------------------------------------------------------------- memory, checkpoints, traffic, time


def available_bytes(job: Job) -> int:
    """Return what a rank has: of the GPU by its name, or this machine's memory shared by its ranks."""
    if job.gpu == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // job.gpus_per_node
    return int(GPUS[job.gpu].memory_gib * 2**30)


def memory(job: Job) -> dict[str, int]:
    """Return bytes per rank by part: the head's exact (``HeadWork.memory``), the others estimates."""
    parts = job.head.memory()
    parts["gathered_features"] *= job.accumulation_steps  # every micro-batch waits for the second pass
    kind = "cpu" if job.gpu == "cpu" else "gpu"
    parts["backbone_state"] = _backbone_state(job)
    kept = job.backbone.kept_bytes[job.compute_dtype]
    if job.ranks > 1:
        kept += (4 - BYTES[job.compute_dtype]) * job.backbone.norm_inputs
    parts["activations"] = int(_SLACK_OF_ACTIVATIONS * kept * job.local_batch)
    if job.profile and job.product_dtype in job.profile.speeds:
        parts["head_libraries"] = job.profile.speeds[job.product_dtype].fixed_bytes
    parts["reserve"] = RESERVE_BYTES[kind] + int(RESERVE_SHARE[kind] * available_bytes(job))
    return parts


def _backbone_state(job: Job) -> int:
    """Return bytes of weights, gradients and optimizer state.

    float32 and bfloat16: float32 throughout, and autocast's copy of the weights. float16 is ZeRO stage 1:
    half weights and gradients, and a rank's share of float32 weights, gradients and moments.
    """
    moments = max(1, MOMENTS[job.optimizer])
    if job.compute_dtype == "float16":
        return job.backbone.parameters * 4 + -(-job.backbone.parameters // job.ranks) * 4 * (2 + moments)
    copies = 2 if job.compute_dtype == "bfloat16" else 0
    return job.backbone.parameters * (4 * (2 + moments) + copies)


def checkpoint(job: Job) -> dict[str, int]:
    """Return the bytes of a checkpoint, and what ``checkpoint.asynchronous`` takes of the memory of a host.

    Rows and backbone with their optimizer state; batch norms' statistics are left out. The copy is of what
    the host's ranks write: their rows, and on the first host the backbone.
    """
    parts = job.head.memory()
    of_rank = parts["rows"] + parts["row_optimizer_state"]
    backbone = job.backbone.parameters * 4 * (1 + max(1, MOMENTS[job.optimizer]))
    return {
        "on_disk": of_rank // job.head.rows * job.classes + backbone,
        "copy_per_host": of_rank * job.gpus_per_node + backbone,
    }


def traffic(job: Job) -> dict[str, dict[str, int]]:
    """Return, per collective, ``bytes`` it is about and what a rank sends ``inside`` and ``between`` nodes.

    A ring of R ranks over n nodes has n links between nodes; averaged over ranks. All are per step.
    """
    batch, dim, ranks = job.batch, job.dim, job.ranks
    channels = job.backbone.norm_channels * job.accumulation_steps
    gradient = job.backbone.parameters * (2 if job.compute_dtype == "float16" else 4)
    ring = (ranks - 1) / ranks
    sent = {  # bytes, and what a rank sends of them
        "all_gather_features": (4 * batch * (dim + 3), ring),
        "all_reduce_sums": (2 * 8 * batch, 2 * ring),
        "all_reduce_nearest": (4 * batch, 2 * ring),
        "reduce_scatter_features": (4 * batch * (dim + 3), ring),
        "all_gather_batch_norm": (2 * 4 * channels * ranks, ring),
        "all_reduce_batch_norm": (2 * 4 * channels, 2 * ring),
        "all_reduce_backbone": (gradient, 2 * ring),
    }
    away = job.nodes / ranks if job.nodes > 1 else 0.0
    return {
        name: {
            "bytes": size,
            "inside": round(size * part * (1 - away)),
            "between": round(size * part * away),
        }
        for name, (size, part) in sent.items()
    }


def seconds(job: Job) -> dict[str, float]:
    """Return seconds of a step by part, one after the other; without reading data and without clipping.

    Clipping (``optim.clip_norm``, on by default) needs the head's norm before its update, and goes through
    the second pass once more.
    """
    times, sheet = job.accumulation_steps, GPUS[job.gpu]
    first, second = job.speed.seconds(job.head)
    images, dtype = job.batch // job.ranks, job.compute_dtype
    kept = memory(job)["activations"] / _SLACK_OF_ACTIVATIONS / job.local_batch
    # float32 weights, gradients and moments are read and written once more by the optimizer
    backbone = images * (
        3 * job.backbone.forward_flop / (sheet.tflops[dtype] * 1e12 * SHARE_OF_TFLOPS[dtype])
        + PASSES_OVER_ACTIVATIONS * kept / (sheet.memory_gb_s * 1e9 * SHARE_OF_MEMORY)
    )
    backbone += 2 * _backbone_state(job) / (sheet.memory_gb_s * 1e9 * SHARE_OF_MEMORY)
    sent = traffic(job)
    of_backbone = {name for name in sent if name.endswith(("batch_norm", "backbone"))}
    return {
        "head_first_pass": times * first,
        "head_second_pass": times * second,
        "head_collectives": sum(_link_seconds(job, sent[n], times) for n in sent.keys() - of_backbone),
        "backbone": backbone,
        "backbone_collectives": sum(
            _link_seconds(job, sent[n], times * job.backbone.norm_layers if n.endswith("norm") else 1)
            for n in of_backbone
        ),
    }


def _link_seconds(job: Job, sent: dict[str, int], calls: int) -> float:
    """Return seconds of a ring, as slow as its slowest link, and the latency of its calls."""
    if job.ranks == 1:
        return 0.0
    sheet = GPUS[job.gpu]
    slowest = max(sent["inside"] / sheet.inside_gb_s, sent["between"] / sheet.between_gb_s)
    return slowest / (1e9 * SHARE_OF_LINK) + calls * sheet.latency_us * 1e-6


# ---------------------------------------------------------------------------------- what fits, and what not


def fits(job: Job) -> bool:
    """Return whether the sum of all parts is within the memory of a rank."""
    return sum(memory(job).values()) <= available_bytes(job)


def largest_classes(job: Job) -> int:
    """Return the largest K that fits with everything else as it is, by bisection; 0 if none does."""
    low, high = 0, job.ranks
    while fits(replace(job, classes=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if middle < job.ranks or fits(replace(job, classes=middle)):
            low = middle
        else:
            high = middle
    return low if low >= job.ranks else 0


@dataclass(frozen=True)
class Advice:
    """A change of the command line, and what comes of it alone."""

    change: str
    total_bytes: int
    largest_classes: int
    fits: bool


def advice(job: Job) -> list[Advice]:
    """Return changes in the order to try them, down to the first that makes the job fit; none if it does.

    1. bfloat16 state  2. one number of state per class  3. both  4. more GPUs for the same batch
    5. half the images at a time, which comes first if not even the fewest classes fit: then the backbone,
    not the head, is too large.
    """
    if fits(job):
        return []
    changes: list[tuple[str, Job]] = []
    both: dict[str, Any] = {}
    if job.state_dtype == "float32":
        both["state_dtype"] = "bfloat16"
        changes.append(("--state-dtype bfloat16", replace(job, state_dtype="bfloat16")))
    if job.optimizer != "row_adagrad":
        both["optimizer"] = "row_adagrad"
        changes.append(("--optimizer row_adagrad", replace(job, optimizer="row_adagrad")))
    if len(both) == 2:
        changes.append(("--state-dtype bfloat16 --optimizer row_adagrad", replace(job, **both)))
    if nodes := _enough_nodes(job):
        larger = replace(job, nodes=nodes)
        changes.append((f"--nodes {nodes} ({larger.ranks} GPUs)", larger))
    if job.local_batch % 2 == 0:
        halved = replace(job, accumulation_steps=2 * job.accumulation_steps)
        smaller = (f"--accumulation-steps {halved.accumulation_steps} (or gradient checkpointing)", halved)
        changes.insert(len(changes) if largest_classes(job) else 0, smaller)
    tried = [_advice(change, changed) for change, changed in changes]
    first = next((i for i, a in enumerate(tried) if a.fits), len(tried))
    return tried[: first + 1]


def _advice(change: str, job: Job) -> Advice:
    return Advice(change, sum(memory(job).values()), largest_classes(job), fits(job))


def _enough_nodes(job: Job) -> int | None:
    """Return the smallest number of nodes that divides the batch and makes the job fit; None if none does."""
    share = job.gpus_per_node * job.accumulation_steps
    for nodes in range(job.nodes + 1, job.batch // share + 1):
        possible = job.batch % (nodes * share) == 0 and nodes * job.gpus_per_node <= job.classes
        if possible and fits(replace(job, nodes=nodes)):
            return nodes
    return None
