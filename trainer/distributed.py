"""Which rank am I, on which device, with whom: the process group of a run.

Launched by ``deepspeed``, ``torchrun``, ``srun`` or plain ``python`` (one rank), on CPU (gloo) or any
accelerator torch knows (NCCL on NVIDIA): this is the one place that asks.
"""

import ctypes
import dataclasses
import os
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from trainer.errors import UserError
from trainer.heartbeat import Heartbeat

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class LostRankError(RuntimeError):
    """Other ranks are gone, or cannot be reached; the message names them and their hosts."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run as one of them sees it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: ProcessGroup
    heart: Heartbeat | None = None

    def at(self, step: int, doing: str) -> None:
        """Tell the other ranks where this one is: step from 1, and what it is about to do. Costs nothing."""
        if self.heart is not None:
            self.heart.at(step, doing)

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and draws figures."""
        return self.rank == 0

    @property
    def has_bfloat16(self) -> bool:
        """True where bfloat16 is native on an accelerator; on CPU it saves no time in most layers."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory this rank has held: of its accelerator, or of the process on CPU."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.accelerator.max_memory_allocated()


def require_memory(num_bytes: int, world: World, what: str) -> None:
    """Raise UserError if this rank's accelerator, or else its host, has less free memory than its ranks need.

    Call it before allocating: the operating system would kill the process half-way, without a word.
    """
    if world.device.type == "cpu":
        require_host_memory(num_bytes, world, what)
    else:
        _require(num_bytes, torch.accelerator.get_memory_info()[0], what, str(world.device))


def require_host_memory(num_bytes: int, world: World, what: str) -> None:
    """The same for memory of the host, where each of its ranks takes so much."""
    _require(num_bytes * world.local_size, _available_bytes(), what, "this host")


def _require(needed: int, available: int, what: str, where: str) -> None:
    if needed > available:
        raise UserError(
            f"{what} needs {needed} bytes on {where} ({needed / 2**30:.1f} GiB), "
            f"{available} are available ({available / 2**30:.1f} GiB)"
        )


def _available_bytes() -> int:
    """Return the memory of the host that is free, within the limit of the container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


@contextmanager
def joined_world(timeout_seconds: float) -> Iterator[World]:
    """Join the process group, and leave it when all went well. Every rank must call it.

    After an exception the group is left alone: other ranks may be in another collective, and waiting for
    them is how a failed run hangs.
    """
    _read_slurm()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed wants to find it there
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    device = _device(local_rank)
    if device.type == "cpu":
        _reuse_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if size == 1:  # no launcher: no address to meet at, none needed
        where: dict = {"store": dist.HashStore()}
    else:
        where = {"init_method": "env://"}
    try:
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
            **where,
        )
    except dist.DistError as error:
        meeting = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise LostRankError(
            f"not all of {size} ranks came to {meeting} within {timeout_seconds:g} s: did every host start, "
            f"and can it reach that address? ({str(error).splitlines()[0]})"
        ) from error
    group = distributed_c10d._get_default_group()
    world = World(
        rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device, group=group
    )
    if size == 1:
        yield world
    else:
        heart = Heartbeat(distributed_c10d._get_default_store(), rank, size)
        with _named_losses(heart):
            yield dataclasses.replace(world, heart=heart)
    dist.destroy_process_group()


@contextmanager
def _named_losses(heart: Heartbeat) -> Iterator[None]:
    """Raise LostRankError, which names the ranks that are gone, when communicating fails for that reason."""
    try:
        yield
    except RuntimeError as error:
        # What gloo and NCCL raise; a subclass of torch's own or ours has another cause.
        is_of_communication = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if is_of_communication and (missing := heart.missing()):
            reason = (str(error).splitlines() or [""])[0]
            raise LostRankError(f"{missing} ({reason})") from error
        raise
    finally:
        heart.leave()


def open_meeting(num_ranks: int) -> tuple[object, list[dict[str, str]]]:
    """Return what must stay alive while ranks of this host run, and the environment of each of them.

    This process keeps the address where they meet: its port cannot be taken between choosing and using it,
    and no rank has to stay until the others have left.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    # "The store is there already": no rank tries to serve it.
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def bound_all_groups(timeout_seconds: float) -> None:
    """Give every process group the same timeout. Call it on all ranks once all groups exist.

    DeepSpeed makes groups of its own and leaves them torch's default of half an hour: a lost host would
    hang the run that long.
    """
    # Public since torch 2.14, private before.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_seconds), group)


def _reuse_freed_memory() -> None:
    """Let glibc keep up to 1 GiB that was freed: what a step frees, the next one wants again.

    By itself it hands activations back to the system and has them zeroed anew: thousands of page faults a
    step, a tenth of the time of a small network (docs/decisions.md). Other allocators have no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _device(local_rank: int) -> torch.device:
    """Return this rank's device; ``DS_ACCELERATOR=cpu`` (DeepSpeed's own switch) keeps a GPU host on CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    if local_rank >= torch.accelerator.device_count():
        raise UserError(
            f"{socket.gethostname()}: rank {local_rank} of this host has no device, there are "
            f"{torch.accelerator.device_count()}; see slots= in the hostfile, --num_gpus or --nproc-per-node"
        )
    torch.accelerator.set_device_index(local_rank)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, local_rank)


def _read_slurm() -> None:
    """Translate srun's variables; MASTER_ADDR and MASTER_PORT come from the batch script."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        # "2(x3),1" are four nodes. SLURM_NTASKS_PER_NODE is there only if it was asked for.
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_TASKS_PER_NODE"])
        tasks = [count for count, nodes in runs for _ in range(int(nodes or 1))]
        os.environ["LOCAL_WORLD_SIZE"] = tasks[int(os.environ["SLURM_NODEID"])]
