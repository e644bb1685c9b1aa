"""What judging costs on this machine: all pairs of a set, and a search among a million distractors.

Features are synthetic, lie in files as ``launch/embed.py`` writes them, and go the way of
``launch/evaluate.py``. The rate of all pairs of a part of the set is compared with that of the bare matrix
products of the same tiles, in turn and by CPU time: the ratio that means something on a shared machine.

Dimensions: N images, D feature, B of a block.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import ProtocolConfig
from trainer.embed import SUMMARY, claim, write_rows
from trainer.errors import UserError
from trainer.models import judge_models
from trainer.order import fold
from trainer.protocols.open_set import BLOCK, all_pairs

ROWS_PER_FILE = 16_384
IN_TURN = 16_384
"""Images of the part whose pairs are compared in turn with bare products."""
NOISE = 1.6
"""Length of what an image adds to the unit centre of its class: genuine cosines around 1 / (1 + NOISE^2)."""


@dataclass(frozen=True, kw_only=True)
class JudgeCase:
    """One measurement; files go into ``folder`` and stay there, for the next."""

    folder: Path
    images: int
    per_class: int
    dim: int
    probes: int
    distractors: int
    rounds: int = 5


def measure_judging(case: JudgeCase) -> dict[str, Any]:
    """Return the figures of one case, in this process alone. Raises UserError."""
    people = _write(case.folder / "people", case.images, case.per_class, case.dim, seed=0)
    config = ProtocolConfig(protocol="open_set", data=people)
    result = {
        "name": "judge",
        "images": case.images,
        "dim": case.dim,
        "threads": torch.get_num_threads(),
        "pairs": case.images * (case.images - 1) // 2,
        **_measured("pairs", lambda: judge_models([], config)[str(people)]),
        **_in_turn(case),
    }
    operations = _operations(case.images, case.dim)
    result["pairs_gflops"] = operations / result["pairs_cpu_seconds"] / 1e9
    if not case.distractors:
        return result
    per_person = max(2, case.probes // 80)  # MegaFace: 3 530 photos of 80 people
    probes = _write(case.folder / "probes", case.probes, per_person, case.dim, seed=1)
    crowd = _write(case.folder / "crowd", case.distractors, 1, case.dim, seed=2)
    search = ProtocolConfig(protocol="distractors", data=probes, distractors=crowd)
    found = _measured("distractors", lambda: judge_models([], search)[str(probes)])
    return {**result, "probes": case.probes, "distractors": case.distractors, **found}


def _in_turn(case: JudgeCase) -> dict[str, float]:
    """Return the rates of bare products and of all pairs of a part of the set, in turn: medians."""
    features_ND, labels_N = _features(min(case.images, IN_TURN), case.per_class, case.dim, seed=0, first=0)
    left_BD, right_DB, out_BB = (
        torch.rand(BLOCK, case.dim),
        torch.rand(BLOCK, case.dim).T,
        torch.empty(BLOCK, BLOCK),
    )
    products = 100
    rates: list[tuple[float, float]] = []
    for _ in range(case.rounds):
        start = time.process_time()
        for _ in range(products):
            torch.mm(left_BD, right_DB, out=out_BB)
        middle = time.process_time()
        all_pairs(features_ND, labels_N)
        end = time.process_time()
        bare = products * 2 * BLOCK * BLOCK * case.dim / (middle - start)
        rates.append((bare, _operations(len(labels_N), case.dim) / (end - middle)))
    return {
        "gemm_gflops_in_turn": statistics.median(bare for bare, _ in rates) / 1e9,
        "pairs_of_gemm_in_turn": statistics.median(ours / bare for bare, ours in rates),
    }


def _operations(images: int, dim: int) -> int:
    """Count the operations of all pairs: 2 D for each of N (N - 1) / 2."""
    return images * (images - 1) * dim


def _measured(name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Return seconds, those of the CPU, the most memory meanwhile, and what was found."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    start, cpu_start = time.perf_counter(), time.process_time()
    found = work()
    return {
        f"{name}_seconds": time.perf_counter() - start,
        f"{name}_cpu_seconds": time.process_time() - cpu_start,
        f"{name}_peak_bytes": _peak_bytes(),
        f"{name}_figures": found,
    }


def _peak_bytes() -> int:
    """Return the most memory since it was forgotten: Python and torch themselves are about 0.5 GB of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _features(num: int, per_class: int, dim: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Return images ``first`` to ``first + num``: a function of the image, whatever the file it is in."""
    labels_N = torch.arange(first, first + num) // per_class
    classes_K, class_N = labels_N.unique(return_inverse=True)
    centres = [torch.randn(dim, generator=_generator(seed, int(k))) for k in classes_K]
    noise_ND = torch.randn(num, dim, generator=_generator(seed, first, 1)) * (NOISE / dim**0.5)
    return F.normalize(F.normalize(torch.stack(centres))[class_N] + noise_ND), labels_N


def _generator(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(fold(*keys))


def _write(folder: Path, num: int, per_class: int, dim: int, seed: int) -> Path:
    """Write synthetic embeddings, unless they are there. Raises UserError if others are."""
    files = range(0, num, ROWS_PER_FILE)
    summary = {
        "num_images": num, "dtype": "float16", "rows_per_file": ROWS_PER_FILE, "num_files": len(files),
        "flip_sum": False, "model": f"synthetic, seed {seed}, width {dim}", "data": "",
    }  # fmt: skip
    if (folder / SUMMARY).is_file():
        if json.loads((folder / SUMMARY).read_text()) != summary:
            raise UserError(f"--folder: {folder} holds embeddings of another measurement: remove it")
        return folder
    staging = folder.with_name(f".{folder.name}.partial")
    failure = claim(staging, summary, [f"person{k}" for k in range(-(-num // per_class))])
    if failure:
        raise UserError(failure)
    for number, first in enumerate(files):
        features_ND, labels_N = _features(min(ROWS_PER_FILE, num - first), per_class, dim, seed, first)
        keys = (f"{i:09d}" for i in range(first, first + len(labels_N)))
        write_rows(staging, number, features_ND.numpy().astype(np.float16), labels_N.numpy(), keys)
    return staging.rename(folder)
