"""What the two passes of the fused head hand to each other, their buffers, and the classes that take part.

Legend: B images of all ranks, C classes of this rank, D width, T rows of a tile, S rows of a class.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer.order import fold

_CLASSES_PER_KEY = 1 << 16


@dataclass
class PassBatch:
    """What the passes need to know of a (micro-)batch."""

    features_BD: Tensor
    scaled_BD: Tensor
    """Features times what makes an exponent of a cosine, in the type of the products."""
    places_B: Tensor
    """The target's row of this rank; outside of its rows if another rank holds it."""
    barred_BS: Tensor
    """All rows of the target's class: more than one with sub-centroids."""
    columns_B: Tensor
    """0..B-1."""
    is_own_B: Tensor
    """Whether this rank holds the target."""
    targets_B: Tensor
    """Cosine of the target, the same on every rank."""
    shift: float
    """What the exponents are lowered by; 0 unless the scale is large."""
    sampled: Tensor | None
    """The rows of this rank that take part, if not all do."""
    kept: list[Tensor] = field(default_factory=list)
    """The exponentials of the first tiles."""


@dataclass
class Sums:
    """What the first pass adds up over the rows of this rank."""

    sums_B: Tensor
    """Of the exponentials (or of a unified loss' terms); float64, as the next two."""
    slope_B: Tensor | None
    """Of what ``loss.learn`` needs: exponential times cosine, or the terms' derivative."""
    direction_D: Tensor | None
    """Of the centroids, for label smoothing."""
    gradient_BD: Tensor
    """Of exponential times centroid."""
    highest_B: Tensor
    """The highest exponent."""
    longest_inverse: Tensor
    """1 / length of the shortest row."""


@dataclass
class Slopes:
    """The gradient of a batch's loss in its cosines."""

    weight_B: Tensor
    """dL/dcos_ik = weight_i e_ik for every class k but the target."""
    slope_B: Tensor
    """dL/dcos of the target, without ``common``."""
    common: Tensor
    """What is taken from dL/dcos of every class, the target's too: label smoothing."""
    norm_B: Tensor | None = None
    """What the length of dL/dcos_i, over all classes of all ranks, does not exceed, if that is known."""
    longest_inverse: Tensor | None = None
    """1 / length of the shortest row of all ranks."""
    factor: Tensor | float = 1.0
    """What all of these are multiplied by, on the way back from the loss; it may be 0."""


class Workspace:
    """Buffers of one tile, allocated once: fresh memory costs a CPU as much as the arithmetic on it."""

    def __init__(self, rows: int, batch: int, dim: int, product_type: torch.dtype, device: torch.device):
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.nothing = torch.tensor(-torch.inf, device=device)  # the logit of a class that does not count
        self._kept: list[Tensor] = []
        self.unit_TD = empty(rows, dim, dtype=product_type)
        self.rows_TD, self.gradient_TD, self.scratch_TD = (empty(rows, dim) for _ in range(3))
        # One row more than a tile has: targets that are elsewhere are written there.
        self.e_TB = empty(rows + 1, batch)
        is_float32 = product_type == torch.float32
        self.product_TB = self.e_TB if is_float32 else empty(rows + 1, batch, dtype=product_type)
        self.product_BD = empty(batch, dim, dtype=product_type)
        self.product_TD = self.gradient_TD if is_float32 else empty(rows, dim, dtype=product_type)

    def buffer_to_keep(self, number: int, rows: int) -> Tensor:
        """Return the buffer of a tile's exponentials that lasts until the second pass."""
        if number == len(self._kept):
            self._kept.append(torch.empty_like(self.product_TB))
        return self._kept[number][: rows + 1]


def bytes_to_keep(chosen: int | None, batch: int, product_bytes: int) -> int:
    """Return how many bytes of exponentials are kept: those ``chosen``, or what is usual.

    A step stays below 128 MiB beside its rows. Each image of the global batch takes about 32 KiB of that
    (features, their gradient and copies at D = 512), and products in 2 bytes a number another 24 MiB (what
    oneDNN rearranges). Measured: docs/scaling.md.
    """
    if chosen is not None:
        return chosen
    return max(16 << 20, (88 << 20) - batch * (32 << 10) - (0 if product_bytes == 4 else 24 << 20))


def drawn_classes(seed: int, step: int, start: int, stop: int, rate: float) -> np.ndarray:
    """Return which of the classes ``start`` to ``stop`` are drawn, each with probability ``rate``.

    A function of (seed, step, class), whoever holds the class.
    """
    drawn = np.empty(stop - start, dtype=bool)
    for first in range(start - start % _CLASSES_PER_KEY, stop, _CLASSES_PER_KEY):
        generator = np.random.Generator(np.random.Philox(key=[fold(seed, step), first // _CLASSES_PER_KEY]))
        block = generator.random(_CLASSES_PER_KEY, dtype=np.float32) < rate
        low, high = max(first, start), min(first + _CLASSES_PER_KEY, stop)
        drawn[low - start : high - start] = block[low - first : high - first]
    return drawn
