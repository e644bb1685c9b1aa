"""Pairs of images in tiles, and how ranks share them: exact cosines, bounded memory, any number of ranks.

Nothing of size N x N exists: cosines are made tile by tile, ``block x block`` at a time. Features are unit
rows, one for each image. (A row of zeros is let pass: it has no direction, its cosine with anything is 0.)

Ranks share the work through plain arguments, so this file knows no process group:

    part    (rank, world): this caller does every world-th piece of the work, starting with piece ``rank``.
    total   sums a tensor of counts (int64, on the features' device) over all callers: an all-reduce.
    gather  concatenates 1-D float32 tensors of different lengths over all callers, in any order.

With ``world > 1`` all ranks must make the same call, and every rank gets the same result, equal for every
world size and every ``block``: only integer counts and sets of scores are exchanged, and a score does not
depend on who computes it. Cosines are accumulated in float64, where products of float32 are exact, and
rounded once to float32, which hides the order of summation that a BLAS chooses by tile shape and threads.

Dimensions: N images, D feature, B images of a block, G of a block of the gallery.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trainer.errors import UserError

BLOCK = 2048  # 4M cosines: 32 MB in float64, 16 MB in float32, the rest masks and the selected scores


def alone(values: Tensor) -> Tensor:
    """Be ``total`` and ``gather`` of a world of one."""
    return values


@dataclass(frozen=True)
class Sharing:
    """How ranks share work: ``part``, ``total`` and ``gather`` of the module's docstring in one argument."""

    part: tuple[int, int] = (0, 1)
    total: Callable[[Tensor], Tensor] = alone
    gather: Callable[[Tensor], Tensor] = alone


ALONE = Sharing()


@dataclass(frozen=True)
class Images:
    """Features, labels and ids, which tell an image from itself; often sorted by label."""

    features: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Images":
        return Images(self.features[rows], self.labels[rows], self.ids[rows])


Work = TypeVar("Work")
Tile = tuple[Images, Images]


def by_class(features_ND: Tensor, labels_N: Tensor) -> Images:
    """Check the input and sort it by label."""
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
        raise ValueError(
            f"features {[*features_ND.shape]} and labels {[*labels_N.shape]} are not N x D and N"
        )
    if len(labels_N) == 0:
        raise UserError("there are no images to evaluate")
    lengths_N = torch.linalg.vector_norm(features_ND, dim=1, dtype=torch.float32)
    wrong_N = ~(((lengths_N - 1).abs() < 1e-3) | (lengths_N == 0))  # NaN is wrong too
    if wrong_N.any():
        row = int(wrong_N.int().argmax())
        cause = "were they normalised?" if lengths_N[row].isfinite() else "the model has diverged"
        raise UserError(f"feature of image {row} has length {float(lengths_N[row]):g} instead of 1: {cause}")
    labels_N, order_N = labels_N.to(features_ND.device).sort(stable=True)
    return Images(features_ND[order_N], labels_N, torch.arange(len(labels_N), device=features_ND.device))


def count_pairs(labels_N: Tensor) -> tuple[int, int]:
    """Count genuine and impostor pairs of sorted labels; refuse to go on without either."""
    counts = torch.unique_consecutive(labels_N, return_counts=True)[1].tolist()
    num_pairs = len(labels_N) * (len(labels_N) - 1) // 2
    num_genuine = sum(n * (n - 1) // 2 for n in counts)
    if not 0 < num_genuine < num_pairs:
        kind = "a different" if num_genuine else "the same"
        raise UserError(f"no two of the {len(labels_N)} evaluated images are of {kind} class")
    return num_genuine, num_pairs - num_genuine


def blocks(length: int, block: int) -> Iterator[slice]:
    """Cut 0..length into slices of ``block``; the last may be shorter."""
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def share(work: Iterable[Work], part: tuple[int, int]) -> Iterator[Work]:
    """Deal the work out like cards, so that ranks get equally many pieces of each size."""
    rank, world = part
    if not 0 <= rank < world:
        raise ValueError(f"part {part} is not (rank, world)")
    return itertools.islice(work, rank, None, world)


def cosines(rows: Images, columns: Images) -> Tensor:
    """Return B x G cosines, correctly rounded to float32 whatever the tile (see the module's docstring).

    Raises UserError for features of two widths.
    """
    widths = rows.features.shape[1], columns.features.shape[1]
    if widths[0] != widths[1]:
        raise UserError(f"features of width {widths[0]} cannot be compared with those of width {widths[1]}")
    return (rows.features.double() @ columns.features.double().T).float()


def overlap(rows: Images, columns: Images) -> bool:
    """Say whether the tile may hold pairs of the same class."""
    return bool(rows.labels[0] <= columns.labels[-1]) and bool(columns.labels[0] <= rows.labels[-1])
