"""Before renting hours: are all hosts of a run alike, healthy and connected as they should be?

Every rank collects facts about itself, all see the facts of all, and each rank draws the same conclusions: a
list of problems that name host, rank and reason. Nothing is raised for what only one rank sees, since the
others would wait for it: a reason travels as a fact.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch

from trainer.backbone import image_size_of
from trainer.collectives import concatenate_over, sum_over, wait_for_all
from trainer.config import Config
from trainer.distributed import World
from trainer.errors import UserError
from trainer.feed import open_training_data
from trainer.options import dump

Facts = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy")
# Facts that have to be the same on every rank, and what to say when one is not.
SAME = {
    "code": "runs other code",
    "config": "has another configuration",
    "versions": "has other versions",
    "data": "has other training data",
    "environment": "has other variables",
    "device": "has another device",
}
# Variables that change how ranks talk; they have to reach all hosts. Names of interfaces may differ.
TALKING = ("NCCL_", "GLOO_", "FI_", "UCX_")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still healthy."""

    clock_seconds: float = 1.0
    """Largest difference between two clocks."""
    disk_gib: float = 10.0
    """Free space where the run folder is."""
    slowest: float = 0.6
    """Speed of a rank's matrix product relative to the median of all."""
    megabytes_per_second: float = 0.0
    """Bus bandwidth of an all-reduce."""
    latency_seconds: float = 0.1
    """Time of the smallest all-reduce."""


@dataclass(frozen=True)
class Report:
    """What was found, the same on every rank."""

    ranks: list[Facts]
    link: dict[str, float]
    problems: list[str]


def preflight(config: Config, world: World, limits: Limits) -> Report:
    """Examine all ranks; every rank must call it, each gets the same report."""
    facts = {"rank": world.rank, "host": socket.gethostname(), **local_facts(config, world)}
    facts["clock_offset_seconds"] = clock_offset(world)
    facts["gemm_gflops"] = gemm_gflops(world)  # all at once, as in training
    link = measure_link(world)
    ranks = share(facts, world)
    return Report(ranks, link, find_problems(ranks, link, limits))


def require_address() -> None:
    """Raise UserError if gloo would offer other hosts an address of this host only.

    Call it before joining. Debian writes ``127.0.1.1 <hostname>`` into /etc/hosts, and gloo takes that.
    """
    master = os.environ.get("MASTER_ADDR", "localhost")
    if "GLOO_SOCKET_IFNAME" in os.environ or _address_of(master).startswith("127."):
        return
    address = _address_of(socket.gethostname())
    if address.startswith("127."):
        raise UserError(
            f"{socket.gethostname()}: its name stands for {address}, which other hosts cannot reach; "
            "set GLOO_SOCKET_IFNAME (such as eth0) in .deepspeed_env, or mend /etc/hosts"
        )


def local_facts(config: Config, world: World) -> Facts:
    """Return what this rank knows by itself; communicates nothing."""
    root = config.run.root if config.run.root.is_absolute() else Path.cwd() / config.run.root
    shared_memory = shutil.disk_usage("/dev/shm")
    interface, address = _interface()
    return {
        "code": code_hash(ROOT),
        "config": _short(dump(config).encode()),
        "versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]
        ),
        "data": _told(lambda: open_training_data(config).fingerprint[:12]),
        "environment": _talking_variables(),
        "device": _device_name(world),
        "disk_free_gib": _told(lambda: shutil.disk_usage(_existing(root)).free / 2**30),
        "shared_memory_gib": shared_memory.free / 2**30,
        "shared_memory_needed_gib": _told(lambda: _shared_memory(config, world) / 2**30),
        "interface": interface,
        "address": address,
        "wandb": _wandb(config.log.wandb) if world.is_main else "",
    }


def find_problems(ranks: Sequence[Facts], link: dict[str, float], limits: Limits) -> list[str]:
    """Return one line for everything that is off, naming host and rank."""
    problems = []
    for name, complaint in SAME.items():
        usual = Counter(facts.get(name) for facts in ranks).most_common(1)[0][0]
        problems += [
            f"{_who(facts)} {complaint}: {name} is {facts.get(name)!r}, elsewhere {usual!r}"
            for facts in ranks
            if facts.get(name) != usual
        ]
    typical = statistics.median(facts["gemm_gflops"] for facts in ranks)
    for facts in ranks:
        who = _who(facts)
        problems += [
            f"{who}: {value}" for value in facts.values() if isinstance(value, str) and "error:" in value
        ]
        offset = facts["clock_offset_seconds"]
        if abs(offset) > limits.clock_seconds:
            problems.append(f"{who}: its clock is {offset:+.1f} s from rank 0's")
        if _number(facts["disk_free_gib"]) < limits.disk_gib:
            problems.append(
                f"{who}: {facts['disk_free_gib']:.1f} GiB free for the run, {limits.disk_gib:g} wanted"
            )
        free, needed = facts["shared_memory_gib"], _number(facts["shared_memory_needed_gib"], 0.0)
        if free < needed:
            problems.append(
                f"{who}: /dev/shm has {free:.2f} GiB free, the data workers of this host need {needed:.2f}"
                " (docker: --shm-size; or lower data.workers)"
            )
        if facts["gemm_gflops"] < limits.slowest * typical:
            problems.append(f"{who} is slow: {facts['gemm_gflops']:.0f} GFLOP/s, the median is {typical:.0f}")
    if link and link["latency_seconds"] > limits.latency_seconds:
        problems.append(
            f"all ranks: an all-reduce of one number takes {link['latency_seconds'] * 1e3:.0f} ms"
        )
    if link and link["megabytes_per_second"] < limits.megabytes_per_second:
        problems.append(
            f"all ranks: all-reduce moves {link['megabytes_per_second']:.0f} MB/s, "
            f"{limits.megabytes_per_second:g} wanted; slowest interface among "
            + ", ".join(sorted({f"{facts['host']}:{facts['interface']}" for facts in ranks}))
        )
    return problems


def clock_offset(world: World) -> float:
    """Return this rank's clock minus rank 0's in seconds; every rank must call it.

    Exact to the time a barrier needs; the median of five leaves out a rank that woke up late.
    """
    offsets = []
    for _ in range(5):
        wait_for_all(world.group)
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        now_R = concatenate_over(now, world.group)
        offsets.append(float(now_R[world.rank] - now_R[0]))
    return statistics.median(offsets)


def gemm_gflops(world: World) -> float:
    """Return the speed of this rank's matrix products, the best of some; communicates nothing."""
    on_cpu = world.device.type == "cpu"
    side = 512 if on_cpu else 8192
    dtype = torch.float32 if on_cpu else torch.bfloat16
    left, right = (torch.randn(side, side, device=world.device, dtype=dtype) for _ in range(2))
    best = min(_seconds(lambda: left @ right, world) for _ in range(8))
    return 2 * side**3 / best / 1e9


def measure_link(world: World) -> dict[str, float]:
    """Return latency and bus bandwidth of an all-reduce, the slowest rank's; every rank must call it.

    Bus bandwidth is 2 (R - 1) / R bytes per second and rank: what a link of a ring carries, comparable with
    the link's own speed (github.com/NVIDIA/nccl-tests, PERFORMANCE.md). Empty for one rank.
    """
    if world.size == 1:
        return {}
    num_floats = (4 << 20) if world.device.type == "cpu" else (64 << 20)
    small, large = (torch.zeros(n, device=world.device) for n in (1, num_floats))
    sum_over(large, world.group)  # connections are made by the first
    latency = statistics.median(_seconds(lambda: sum_over(small, world.group), world) for _ in range(20))
    seconds = statistics.median(_seconds(lambda: sum_over(large, world.group), world) for _ in range(3))
    measured = torch.tensor([[latency, seconds]], dtype=torch.float64, device=world.device)
    latency, seconds = concatenate_over(measured, world.group).amax(0).tolist()
    bytes_of_bus = 2 * (world.size - 1) / world.size * num_floats * 4
    return {"latency_seconds": latency, "megabytes_per_second": bytes_of_bus / seconds / 1e6}


def share(facts: Facts, world: World) -> list[Facts]:
    """Return the facts of all ranks in rank order; every rank must call it. They travel as JSON."""
    line = np.frombuffer((json.dumps(facts) + "\n").encode(), dtype=np.uint8).copy()
    lines = concatenate_over(torch.from_numpy(line).to(world.device), world.group)
    return [json.loads(text) for text in bytes(lines.tolist()).decode().splitlines()]


def code_hash(root: Path) -> str:
    """Return a hash of the names and contents of the trainer's own Python files below ``root``."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("trainer/**/*.py"), *root.glob("launch/**/*.py")]):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def table(report: Report) -> str:
    """Return the report as one aligned table, the link below it, and then what is off."""
    columns = {
        "rank": lambda f: str(f["rank"]),
        "host": lambda f: f["host"],
        "device": lambda f: f["device"],
        "code": lambda f: f["code"],
        "config": lambda f: f["config"],
        "data": lambda f: "error" if "error:" in f["data"] else f["data"],
        "clock": lambda f: f"{f['clock_offset_seconds']:+.3f} s",
        "disk": lambda f: f"{_number(f['disk_free_gib']):.0f} GiB",
        "shm": lambda f: f"{f['shared_memory_gib']:.1f} GiB",
        "interface": lambda f: f"{f['interface']} {f['address']}",
        "GFLOP/s": lambda f: f"{f['gemm_gflops']:.0f}",
    }
    rows = [list(columns), *([str(tell(facts)) for tell in columns.values()] for facts in report.ranks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"versions  {report.ranks[0]['versions']}", f"W&B       {report.ranks[0]['wandb']}"]
    if report.link:
        lines.append(
            f"link      all-reduce {report.link['latency_seconds'] * 1e3:.2f} ms, "
            f"{report.link['megabytes_per_second']:.0f} MB/s"
        )
    return "\n".join(lines + [""] + ([f"PROBLEM   {problem}" for problem in report.problems] or ["all well"]))


def _seconds(work: Callable[[], object], world: World) -> float:
    began = time.perf_counter()
    work()
    if world.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def _told(look: Callable[[], Any]) -> Any:
    """Return what ``look`` finds, or the reason why it cannot, as a fact that other ranks can read."""
    try:
        return look()
    except (UserError, OSError) as error:
        return f"error: {error}"


def _who(facts: Facts) -> str:
    return f"{facts['host']} (rank {facts['rank']})"


def _number(value: Any, otherwise: float = float("inf")) -> float:
    """Return a fact that is a number; one that could not be found is reported by its own line."""
    return value if isinstance(value, int | float) else otherwise


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _existing(path: Path) -> Path:
    """Return the nearest folder that is there: the run's own is made when training starts."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _talking_variables() -> str:
    chosen = {k: v for k, v in os.environ.items() if k.startswith(TALKING) and "SOCKET_IFNAME" not in k}
    return " ".join(f"{name}={value}" for name, value in sorted(chosen.items()))


def _device_name(world: World) -> str:
    if world.device.type == "cpu":
        return "cpu"
    return torch.get_device_module(world.device).get_device_name(world.device)


def _shared_memory(config: Config, world: World) -> float:
    """Return the bytes that batches on their way from the data workers of this host can occupy."""
    side, local_batch = image_size_of(config.backbone), config.data.batch_size / world.size
    batch_bytes = local_batch / config.engine.accumulation_steps * config.backbone.channels * side**2
    return 2 * config.data.workers * world.local_size * batch_bytes  # torch prefetches two per worker


def _interface() -> tuple[str, str]:
    """Return name and address of the interface by which this rank reaches others, as gloo chooses it."""
    named = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    address = _address_of(socket.gethostname())
    for name, addresses in psutil.net_if_addrs().items():
        for candidate in addresses:
            if candidate.family == socket.AF_INET and (name == named or candidate.address == address):
                return name, candidate.address
    return named or "?", address


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "unknown"


def _wandb(mode: str) -> str:
    """Return how W&B will be used; online it has to be reachable from this host."""
    if mode != "online":
        return mode
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=5).close()
    except OSError as error:
        return f"error: log.wandb=online, but {url.geturl()} is out of reach ({error}); take offline"
    return f"online, {url.geturl()} answers"
