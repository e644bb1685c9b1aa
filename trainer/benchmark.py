"""What the head costs on this machine: time and memory of its steps, beside its bare matrix products.

Everything that is compared is measured in turn, step by step in the same process, and reported as a median:
on a shared machine only such ratios mean something. Legend: see ``trainer/fused.py``.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.collectives import from_all, wait_for_all
from trainer.distributed import World, require_memory
from trainer.fused import FusedCocoHead
from trainer.head import ClassShard, CocoHead
from trainer.margins import CosineSoftmax
from trainer.optimizer import allocate_state
from trainer.scale import scale_of
from trainer.textbook import TextbookHead

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """One measurement."""

    classes: int
    dim: int
    batch: int
    dtype: str
    update: str
    against: str | None
    steps: int
    tile_rows: int | None = None
    cache_mib: int | None = None


def measure_head(case: HeadCase, world: World) -> dict[str, Any]:
    """Return the figures of one case; every rank must call it, each gets the same.

    Times are those of the slowest rank, bytes those of the rank with most.
    """
    shard = ClassShard.of_rank(case.classes, world.rank, world.size)
    matrices = 2 if case.update == "fused" else 3
    require_memory(
        len(shard) * case.dim * matrices * TYPES[case.dtype].itemsize, world, f"--classes {case.classes}"
    )
    head, step, state_bytes = _build(case, shard, world)
    embeddings_ND, labels_N = _batch(case, world)
    resident = _reset_peak(world)
    losses = [step(embeddings_ND, labels_N) for _ in range(2)]
    peak_bytes = _peak(world) - resident
    timed = {"step": step}
    if isinstance(head, FusedCocoHead):
        timed["gemm"] = _bare_products(head, case.batch)
    if case.against == "textbook":
        textbook = TextbookHead(
            shard, case.dim, scale=head.loss.scale, product_type=TYPES[case.dtype], group=world.group
        ).to(world.device)
        timed["textbook"] = textbook.step
        textbook.step(embeddings_ND, labels_N)
    batch = (embeddings_ND, labels_N)
    seconds = in_turn({name: partial(way, *batch) for name, way in timed.items()}, case.steps, world)
    result: dict[str, Any] = {
        "name": f"head-{case.update}",
        "classes": case.classes,
        "dim": case.dim,
        "global_batch": case.batch,
        "ranks": world.size,
        "dtype": case.dtype,
        "step_seconds": seconds["step"],
        "state_bytes_per_rank": max(from_all(state_bytes, world.group)),
        "peak_extra_bytes_per_rank": max(from_all(peak_bytes, world.group)),
        "loss": float(losses[0]),
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if world.device.type == "cpu" else world.size,
    }
    if "gemm" in seconds:
        result |= {"gemm_seconds": seconds["gemm"], "step_over_gemm": seconds["step"] / seconds["gemm"]}
    if "textbook" in seconds:
        result |= {"textbook_seconds": seconds["textbook"], "speedup": seconds["textbook"] / seconds["step"]}
    return result


def _build(case: HeadCase, shard: ClassShard, world: World) -> tuple[CocoHead, Step, int]:
    """Return the head, its whole step and the bytes of its rows and their optimizer state."""
    loss = CosineSoftmax(scale_of("paper", case.classes))
    dtype = TYPES[case.dtype]
    if case.update == "fused":
        kept = None if case.cache_mib is None else case.cache_mib << 20
        types: dict[str, Any] = {"row_type": dtype, "product_type": dtype}
        head: CocoHead = FusedCocoHead(
            shard,
            case.dim,
            loss=loss,
            seed=0,
            group=world.group,
            tile_rows=case.tile_rows,
            cache_bytes=kept,
            **types,
        )
    else:
        head = CocoHead(shard, case.dim, loss=loss, seed=0, group=world.group)
    head = head.to(world.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, fused=True)
    allocate_state(optimizer)
    rows = head.centroids_CD

    def step(embeddings_ND: Tensor, labels_N: Tensor) -> Tensor:
        output = head(embeddings_ND, labels_N)
        output.loss.backward()
        head.update(optimizer, divisor=1.0, step=0)
        head.end_step()
        return output.loss.detach()

    return head, step, 2 * rows.numel() * rows.element_size()


def _batch(case: HeadCase, world: World) -> tuple[Tensor, Tensor]:
    """Return this rank's part of a global batch that does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(1)
    embeddings_BD = torch.randn(case.batch, case.dim, generator=generator)
    labels_B = torch.randint(case.classes, (case.batch,), generator=generator)
    own = slice(world.rank * case.batch // world.size, (world.rank + 1) * case.batch // world.size)
    return embeddings_BD[own].to(world.device).requires_grad_(), labels_B[own].to(world.device)


def _bare_products(head: FusedCocoHead, batch: int) -> Step:
    """Return a function that runs the four matrix products of a step on the head's own tiles, and no more."""
    rows_CD, dtype = head.centroids_CD.detach(), head.product_type
    tile = min(head.rows_of_tile(batch), len(head.shard))
    device, dim = rows_CD.device, rows_CD.shape[1]
    features_BD = torch.randn(batch, dim, device=device).to(dtype)
    z_TB = torch.zeros(tile, batch, device=device, dtype=dtype)
    gradient_BD = torch.zeros(batch, dim, device=device, dtype=dtype)
    gradient_TD = torch.zeros(tile, dim, device=device, dtype=dtype)

    def products(embeddings_ND: Tensor, labels_N: Tensor) -> Tensor:
        for second_pass in (False, True):
            for low, high in head.tiles(batch):
                rows = high - low
                torch.mm(rows_CD[low:high].to(dtype), features_BD.T, out=z_TB[:rows])
                if second_pass:
                    torch.mm(z_TB[:rows], features_BD, out=gradient_TD[:rows])
                else:
                    torch.mm(z_TB[:rows].T, rows_CD[low:high].to(dtype), out=gradient_BD)
        return gradient_BD

    return products


def in_turn(timed: dict[str, Callable[[], object]], rounds: int, world: World) -> dict[str, float]:
    """Return the median seconds of each, of the slowest rank in every round. Every rank must call it."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, step in timed.items():
            wait_for_all(world.group)
            began = time.perf_counter()
            step()
            synchronise(world)
            seconds[name].append(max(from_all(time.perf_counter() - began, world.group)))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _reset_peak(world: World) -> int:
    """Begin to measure a peak of memory; return what is held now, in bytes."""
    if world.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from now
    return _of_process("VmRSS")


def _peak(world: World) -> int:
    if world.device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    return _of_process("VmHWM")


def _of_process(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def synchronise(world: World) -> None:
    """Wait until the device has done its work."""
    if world.device.type != "cpu":
        torch.accelerator.synchronize()
