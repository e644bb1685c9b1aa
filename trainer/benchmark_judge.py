"""What judging costs on this machine: all pairs of a set, and a search among a million distractors.

Features are synthetic, lie in files as ``launch/embed.py`` writes them, and go the way of
``launch/evaluate.py``. Beside the time stands that of the bare matrix products of the same shape and number
of threads: before, after, and in turn with all pairs of a part of the set, which is the ratio that means
something on a shared machine.

Dimensions: N images, D feature, B of a block.
"""

import json
import resource
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
    gemm = [_gemm_rate(case.dim)]
    config = ProtocolConfig(protocol="open_set", data=people)
    seconds, pairs_found = _timed(lambda: judge_models([], config)[str(people)])
    memory = _peak_bytes()
    gemm.append(_gemm_rate(case.dim))
    flops = case.images * (case.images - 1) * case.dim  # 2 D for each of N (N - 1) / 2 pairs
    result = {
        "name": "judge",
        "images": case.images,
        "dim": case.dim,
        "threads": torch.get_num_threads(),
        "pairs": case.images * (case.images - 1) // 2,
        "pairs_seconds": seconds,
        "pairs_gflops": flops / seconds / 1e9,
        "pairs_peak_bytes": memory,
        "gemm_gflops": [rate / 1e9 for rate in gemm],
        "pairs_of_gemm_in_turn": _in_turn(case),
        "figures": pairs_found,
    }
    if case.distractors:
        result |= _measure_distractors(case)
    return result


def _measure_distractors(case: JudgeCase) -> dict[str, Any]:
    per_person = max(2, case.probes // 80)  # MegaFace: 3 530 photos of 80 people
    probes = _write(case.folder / "probes", case.probes, per_person, case.dim, seed=1)
    crowd = _write(case.folder / "crowd", case.distractors, 1, case.dim, seed=2)
    config = ProtocolConfig(protocol="distractors", data=probes, distractors=crowd)
    seconds, found = _timed(lambda: judge_models([], config)[str(probes)])
    return {
        "probes": case.probes,
        "distractors": case.distractors,
        "distractors_seconds": seconds,
        "distractors_peak_bytes": _peak_bytes(),  # of the process until now
        "distractors_figures": found,
    }


def _in_turn(case: JudgeCase) -> float:
    """Return the rate of all pairs of a part of the set, as a share of that of bare products: a median."""
    features_ND, labels_N = _features(min(case.images, IN_TURN), case.per_class, case.dim, seed=0, first=0)
    ratios = []
    for _ in range(case.rounds):
        gemm = _gemm_rate(case.dim)
        seconds, _ = _timed(lambda: all_pairs(features_ND, labels_N))
        ratios.append(len(labels_N) * (len(labels_N) - 1) * case.dim / seconds / gemm)
    return statistics.median(ratios)


def _gemm_rate(dim: int, seconds: float = 2.0) -> float:
    """Return the operations a second of B x D times D x B products that nobody looks at."""
    left_BD, right_DB, out_BB = torch.rand(BLOCK, dim), torch.rand(BLOCK, dim).T, torch.empty(BLOCK, BLOCK)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(left_BD, right_DB, out=out_BB)
        count += 1
    return count * 2 * BLOCK * BLOCK * dim / (time.perf_counter() - start)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _peak_bytes() -> int:
    """Return the most memory this process has had: Python and torch themselves are about 0.4 GB of it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
