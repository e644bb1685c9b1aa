"""What a step of the fused head costs: bytes and operations from its shapes, seconds from a speed.

The speed is a device's data sheet, or a profile: least squares over measurements of the user's own machine.
Legend: B images of all ranks, C classes of the rank with most, K of all, D width, R ranks, T classes of a
tile.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.machines import GPUS, SHARE_OF_MEMORY, SHARE_OF_TFLOPS
from trainer.passes import bytes_to_keep

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"sgd": 1, "adamw": 2, "row_adagrad": 0}
_NOISE_ROWS = 2 * 1024  # of the table in trainer/rows.py


@dataclass(frozen=True, kw_only=True)
class HeadWork:
    """What a rank's part of the fused head holds and does in a step; all numbers follow from the shapes."""

    classes: int
    dim: int
    batch: int
    """Images of one pass: those of all ranks in a micro-batch."""
    ranks: int
    state_dtype: str
    product_dtype: str
    optimizer: str
    on_cpu: bool
    cache_bytes: int | None = None
    """Of exponentials that are kept; None is what the head chooses by itself."""
    turns: float = 1.0
    """Ranks that share a processor: each takes so many times as long."""

    @property
    def rows(self) -> int:
        """C of the rank with most."""
        return -(-self.classes // self.ranks)

    @property
    def tile_rows(self) -> int:
        """T, as ``FusedCocoHead.rows_of_tile`` chooses it."""
        numbers = 3 << 18 if self.on_cpu else 1 << 26
        return int(1 << max(6, int(math.log2(numbers / (self.dim + self.batch)))))

    @property
    def kept_tiles(self) -> int:
        """Tiles whose exponentials wait for the second pass."""
        tile_bytes = (self.tile_rows + 1) * self.batch * BYTES[self.product_dtype]
        kept_bytes = bytes_to_keep(self.cache_bytes, self.batch, BYTES[self.product_dtype])
        return min(kept_bytes // tile_bytes, -(-self.rows // self.tile_rows))

    def memory(self) -> dict[str, int]:
        """Return bytes by part. Exact but for the temporaries in "gathered features"."""
        width, product = BYTES[self.state_dtype], BYTES[self.product_dtype]
        tile = min(self.tile_rows, self.rows)
        e_bytes = (tile + 1) * self.batch
        moments = MOMENTS[self.optimizer]
        buffers = (3 * 4 + product) * tile * self.dim + 4 * e_bytes + product * self.batch * self.dim
        if self.product_dtype != "float32":
            buffers += product * (e_bytes + tile * self.dim)
        if self.state_dtype != "float32":
            buffers += 4 * self.dim * (moments * tile + _NOISE_ROWS)
        state = moments * width * self.dim if moments else 4
        return {
            "rows": width * self.rows * self.dim,
            "row_optimizer_state": self.rows * state,
            "inverse_lengths": 4 * self.rows,
            "last_seen": 4 * self.rows,
            "tile": buffers,
            "kept_exponentials": self.kept_tiles * product * e_bytes,
            # gathered, their gradient, twice in the type of products; cosines of targets in float64
            "gathered_features": self.batch * (4 * (self.dim + 3) + (4 + 2 * product + 16) * self.dim),
        }

    @property
    def total_bytes(self) -> int:
        """Sum of ``memory``."""
        return sum(self.memory().values())

    def flop(self) -> tuple[float, float]:
        """Return operations of pass 1 and 2: four products of 2 B D C, less what was kept."""
        product = 2.0 * self.batch * self.dim * self.rows
        return 2 * product, (2 - self._kept_share) * product

    def traffic(self) -> tuple[float, float]:
        """Return bytes that pass 1 and 2 read and write outside of matrix products, line by line of fused.py.

        They come from memory on a GPU and from the cache on a CPU.
        """
        low_rows, low_products = self.state_dtype != "float32", self.product_dtype != "float32"
        exponentials = 8 + (6 + 6 if low_products else 0)  # exp2 in place; to float32 before and back after
        unit = 4 + 4 + (6 if low_products else 0)
        load = 6 if low_rows else 0
        first_B, first_D = exponentials + 4 + 4, load + 4 + unit  # maximum and sum; length
        remade = 1 - self._kept_share
        # tangent: product and its sum, addcmul, scale; length for the norm; then the optimizer
        second_D = load + (6 if low_products else 0) + (12 + 4) + 12 + 8 + 4 + self._optimizer_bytes(low_rows)
        first = self.rows * (first_B * self.batch + first_D * self.dim)
        second = self.rows * (remade * exponentials * self.batch + (second_D + remade * unit) * self.dim)
        return float(first), float(second)

    def _optimizer_bytes(self, low_rows: bool) -> int:
        """Return bytes per number of a row: read and write it and its moments, read the gradient."""
        moments = MOMENTS[self.optimizer]
        if not moments:
            return 4 + 8 + 12 + (26 if low_rows else 0)
        return 12 + 8 * moments + (26 + 12 * moments if low_rows else 0)  # add noise, cut, store; load, store

    @property
    def _kept_share(self) -> float:
        return min(1.0, self.kept_tiles * self.tile_rows / self.rows)


@dataclass(frozen=True)
class HeadSpeed:
    """What turns ``HeadWork`` into seconds, for one type of products; and what it does not explain."""

    seconds_per_flop: float
    seconds_per_byte: float
    constant_seconds: float
    fixed_bytes: int = 0
    """What libraries hold beside the parts of ``HeadWork.memory``."""

    def seconds(self, work: HeadWork) -> tuple[float, float]:
        """Return seconds of pass 1 (with the constant) and pass 2."""
        first, second = (
            work.turns * (flop * self.seconds_per_flop + moved * self.seconds_per_byte)
            for flop, moved in zip(work.flop(), work.traffic(), strict=True)
        )
        return first + self.constant_seconds, second


def speed_of(gpu: str, dtype: str) -> HeadSpeed:
    """Return the speed by the data sheet, which measured nothing; 2 ms go for starting kernels."""
    sheet = GPUS[gpu]
    flop_per_second = sheet.tflops[dtype] * 1e12 * SHARE_OF_TFLOPS[dtype]
    return HeadSpeed(1 / flop_per_second, 1 / (sheet.memory_gb_s * 1e9 * SHARE_OF_MEMORY), 2e-3)


@dataclass(frozen=True)
class Profile:
    """Speeds that were measured, and how well they give back what they were made from."""

    path: str
    lines: int
    device: str
    processors: int
    """Cores (or accelerators) of the machine: with more ranks than that, ranks take turns."""
    speeds: dict[str, HeadSpeed]
    """By type of the products."""
    worst_time_error: float
    """Largest |fitted / measured - 1| of the step times."""
    worst_memory_error: float
    """The same of state + extra bytes, of which one constant per type is fitted."""


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "classes": int, "dim": int, "global_batch": int, "ranks": int, "processors": int, "dtype": str,
    "device": str,
    "step_seconds": (int, float), "gemm_seconds": (int, float),
    "state_bytes_per_rank": int, "peak_extra_bytes_per_rank": int,
}  # fmt: skip


def read_profile(path: Path) -> Profile:
    """Fit the lines of ``launch/benchmark.py head``, made with its own tiles and cache. Raises UserError."""
    lines = list(_profile_lines(path))
    devices = sorted({line["device"] for line in lines})
    if len(devices) != 1:
        raise UserError(f"--profile {path}: lines of one device are needed, got {devices or 'none'}")
    works = [_work_of(line) for line in lines]
    speeds = {}
    for dtype in sorted({line["dtype"] for line in lines}):
        chosen = [i for i, line in enumerate(lines) if line["dtype"] == dtype]
        try:
            speeds[dtype] = fit_speed([works[i] for i in chosen], [lines[i] for i in chosen])
        except ValueError as error:
            raise UserError(f"--profile {path}: {dtype}: {error}") from error
    errors = [
        (
            abs(sum(speeds[work.product_dtype].seconds(work)) / line["step_seconds"] - 1),
            abs((work.total_bytes + speeds[work.product_dtype].fixed_bytes) / _measured_bytes(line) - 1),
        )
        for work, line in zip(works, lines, strict=True)
    ]
    worst_time_error, worst_memory_error = map(max, zip(*errors, strict=True))
    processors = max(line["processors"] for line in lines)
    return Profile(
        str(path), len(lines), devices[0], processors, speeds, worst_time_error, worst_memory_error
    )


def fit_speed(works: Sequence[HeadWork], lines: Sequence[dict[str, Any]]) -> HeadSpeed:
    """Return a, b, c >= 0 of step = a flop + b bytes + c and products = a 4 (2 B D C), by least squares.

    Errors are relative, so that short steps count as much as long ones. Raises ValueError when the lines
    are too few or too alike to tell the three apart.
    """
    equations, seconds = [], []
    for work, line in zip(works, lines, strict=True):
        flop, moved = sum(work.flop()) * work.turns, sum(work.traffic()) * work.turns
        equations += [[flop, moved, 1.0], [2 * work.flop()[0] * work.turns, 0.0, 0.0]]
        seconds += [line["step_seconds"], line["gemm_seconds"]]
    a, b, c = _non_negative_least_squares(np.array(equations) / np.array(seconds)[:, None])
    if not a:
        raise ValueError("no time of the matrix products can be made out")
    beyond = [_measured_bytes(line) - work.total_bytes for work, line in zip(works, lines, strict=True)]
    return HeadSpeed(a, b, c, max(0, int(np.median(beyond))))


def _measured_bytes(line: dict[str, Any]) -> int:
    return line["state_bytes_per_rank"] + line["peak_extra_bytes_per_rank"]


def _non_negative_least_squares(rows_NX: np.ndarray) -> list[float]:
    """Return x >= 0 with the smallest |rows x - 1|: the best of all choices of which are 0."""
    size = rows_NX.shape[1]
    scale_X = rows_NX.max(axis=0)
    scaled_NX = rows_NX / scale_X
    if len(rows_NX) < size or np.linalg.cond(scaled_NX) > 1e6:
        raise ValueError("needs lines with different numbers of classes")
    best, best_error = np.zeros(size), math.inf
    for number in range(1, size + 1):
        for chosen in map(list, itertools.combinations(range(size), number)):
            x, *_ = np.linalg.lstsq(scaled_NX[:, chosen], np.ones(len(rows_NX)), rcond=None)
            error = float(np.square(scaled_NX[:, chosen] @ x - 1).sum())
            if (x >= 0).all() and error < best_error:
                best, best_error = np.zeros(size), error
                best[chosen] = x
    return [float(x) for x in best / scale_X]


def _profile_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--profile {path}: {reason}") from error
    for number, row in enumerate(text.splitlines(), 1):
        if row.strip():
            yield _checked_line(f"--profile {path}:{number}", row)


def _checked_line(where: str, row: str) -> dict[str, Any]:
    try:
        line = json.loads(row)
    except ValueError as error:
        raise UserError(f"{where}: not JSON") from error
    if not isinstance(line, dict) or line.get("name") != "head-fused":
        raise UserError(f'{where}: not a line of "benchmark.py head": "name" is not "head-fused"')
    for name, kind in _FIELDS.items():
        value = line.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f'{where}: "{name}" is {value!r}')
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise UserError(f'{where}: "{name}" is {value}, not above 0')
    if line["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f'{where}: "dtype" is {line["dtype"]!r}')
    return line


def _work_of(line: dict[str, Any]) -> HeadWork:
    return HeadWork(
        classes=line["classes"], dim=line["dim"], batch=line["global_batch"], ranks=line["ranks"],
        state_dtype=line["dtype"], product_dtype=line["dtype"], optimizer="sgd",
        on_cpu=line["device"] == "cpu", turns=max(1.0, line["ranks"] / line["processors"]),
    )  # fmt: skip
