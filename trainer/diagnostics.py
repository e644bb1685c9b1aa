"""How a head and its embeddings look inside: near centroids, weak classes, the rank that embeddings use.

Nothing of size K x K exists: some classes (all, if there are few) are compared with all rows, tile by tile,
every rank with its own. Legend: P probes, T rows of a tile, K classes, B images, N images of a set, D width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.captions import class_name
from trainer.collectives import concatenate_over, max_over, sum_over

BINS = 200
"""Of the histogram of cosines from -1 to 1: a bin is 0.01 wide."""
MAX_PROBES = 4096
MAX_DIRECTIONS = 1000
WORST = 12
"""Classes that tables show."""
_PROBES_AT_ONCE, _TILE_ROWS, _IMAGES_AT_ONCE = 256, 16384, 1024


@dataclass(frozen=True)
class Nearest:
    """Of some features: the cosine to their own class, and the nearest other; the same on every rank."""

    own_P: Tensor
    other_P: Tensor
    other_class_P: Tensor
    histogram: Tensor
    """Number of pairs with a row of another class, by cosine."""


@dataclass(frozen=True)
class Neighbours:
    """How the centroids lie to each other."""

    histogram: Tensor
    """Pairs of different classes by cosine, BINS from -1 to 1; of the probed classes with all."""
    pairs: list[tuple[float, int, int]]
    """(cosine, class, class) of classes and their nearest others, the closest first; no pair twice."""
    metrics: dict[str, float]
    """``head/...`` -> value."""


@dataclass(frozen=True)
class ClassResult:
    """What a head makes of the test images of one class."""

    name: str
    images: int
    accuracy: float
    cosine: float
    """Mean cosine to the own centroid."""
    margin: float
    """Mean of that less the cosine of the nearest other."""
    taken_for: str
    """The class that most of its images are nearest to, besides itself."""
    label: int
    """The head's."""
    loss: float | None = None
    """Mean loss of its images by the head's own formula; of the worst classes only, and only if an image has
    a loss without others."""


@dataclass(frozen=True)
class HeadView:
    """What the head looks like inside, found by all ranks together."""

    neighbours: Neighbours
    classes: dict[str, list[ClassResult]]
    """Of every test set of classes that the head knows: worst first."""
    class_names: tuple[str, ...]
    directions_KD: Tensor
    """The unit vectors that stand for the classes; of a head with more than MAX_DIRECTIONS none (0 x D)."""
    direction_names: tuple[str, ...]
    metrics: dict[str, float]


def view_head(
    head: Any, results: Sequence[Any], class_names: Sequence[str], known: Sequence[str]
) -> HeadView:
    """Look at the head and at the sets named in ``known``; every rank must call it, with equal results.

    ``results`` are ``evaluate.SetResult``; those without images, which protocols are, are passed over.
    """
    neighbours = centroid_neighbours(head)
    metrics, classes = dict(neighbours.metrics), {}
    label_of = {name: label for label, name in enumerate(class_names)}
    for result in (each for each in results if len(each.labels_N)):
        metrics[f"eval/{result.name}/effective_rank"] = effective_rank(result.embeddings_ND)
        if result.name in known:
            labels_N = result.labels_N
            if class_names and result.class_names:
                labels_N = torch.tensor([label_of[name] for name in result.class_names])[labels_N]
            device = next(head.parameters()).device
            classes[result.name] = class_results(
                head, result.embeddings_ND.to(device), labels_N.to(device), class_names
            )
    own_CD = head.directions_CD()
    shown_CD = own_CD if head.row_shard.num_classes <= MAX_DIRECTIONS else own_CD[:0]
    directions_KD = concatenate_over(shown_CD, head.group).cpu()
    per_class = head.row_shard.num_classes // head.shard.num_classes
    names = tuple(class_name(row // per_class, class_names) for row in range(len(directions_KD)))
    return HeadView(neighbours, classes, tuple(class_names), directions_KD, names, metrics)


@torch.no_grad()
def nearest_classes(head: Any, features_PD: Tensor, classes_P: Tensor) -> Nearest:
    """Compare unit features with all rows of the head, whose owners they may be. Every rank must call it."""
    rows = next(p for p in head.parameters() if p.ndim > 1)
    per_class = len(head.row_shard) // len(head.shard)
    own_P = features_PD.new_full((len(features_PD),), -2.0)
    other_P, place_P = own_P.clone(), torch.full_like(classes_P, -1)
    histogram = torch.zeros(BINS, dtype=torch.float64, device=features_PD.device)
    for low in range(0, len(rows), _TILE_ROWS):
        unit_TD = F.normalize(rows[low : low + _TILE_ROWS].float())
        cosine_PT = (features_PD @ unit_TD.T).clamp_(-1, 1)
        first = head.row_shard.start + low
        classes_T = torch.arange(first, first + len(unit_TD), device=rows.device) // per_class
        is_own_PT = classes_T == classes_P[:, None]
        own_P = torch.maximum(own_P, cosine_PT.masked_fill(~is_own_PT, -2.0).amax(1))
        best_P, column_P = cosine_PT.masked_fill_(is_own_PT, -2.0).max(1)
        place_P = torch.where(best_P > other_P, classes_T[column_P], place_P)
        other_P = torch.maximum(other_P, best_P)
        histogram += torch.histc(cosine_PT, BINS, -1, 1)  # leaves out what is below -1
    highest_P = max_over(other_P, head.group)
    place_P = max_over(place_P.where(other_P == highest_P, torch.full_like(place_P, -1)), head.group)
    return Nearest(max_over(own_P, head.group), highest_P, place_P, sum_over(histogram, head.group))


@torch.no_grad()
def centroid_neighbours(head: Any, *, max_probes: int = MAX_PROBES, num_pairs: int = 16) -> Neighbours:
    """Find the classes closest to each other; at most ``max_probes``, evenly spaced, look for theirs.

    Every rank must call it; each gets the same. The closest pair of probed classes is always among them.
    """
    rows = next(p for p in head.parameters() if p.ndim > 1)
    start, total = head.row_shard.start, head.row_shard.num_classes
    per_class = len(head.row_shard) // len(head.shard)
    probes = torch.linspace(0, total - 1, min(total, max_probes), dtype=torch.float64).round().long()
    found = []
    for places_P in probes.to(rows.device).split(_PROBES_AT_ONCE):
        own_P = (places_P >= start) & (places_P < start + len(rows))
        unit_PD = torch.zeros(len(places_P), rows.shape[1], device=rows.device)
        unit_PD[own_P] = F.normalize(rows[places_P[own_P] - start].float())
        found.append(nearest_classes(head, sum_over(unit_PD, head.group), places_P // per_class))
    cosine = torch.cat([part.other_P for part in found]).cpu()
    other = torch.cat([part.other_class_P for part in found]).cpu()
    pairs: dict[tuple[int, int], float] = {}
    for i in cosine.argsort(descending=True).tolist():
        a, b = int(probes[i]) // per_class, int(other[i])
        pairs.setdefault((min(a, b), max(a, b)), float(cosine[i]))
        if len(pairs) == num_pairs:
            break
    metrics = {
        "head/cosine_nearest_mean": float(cosine.mean()),
        "head/cosine_nearest_max": float(cosine.max()),
        "head/cosine_nearest_above_0.7": float((cosine > 0.7).double().mean()),
    }
    histogram = torch.stack([part.histogram for part in found]).sum(0).cpu()
    return Neighbours(histogram, [(value, a, b) for (a, b), value in pairs.items()], metrics)


@torch.no_grad()
def class_results(
    head: Any, embeddings_ND: Tensor, labels_N: Tensor, class_names: Sequence[str]
) -> list[ClassResult]:
    """Return the result of every class that has images, the worst first, WORST of them with their loss.

    ``labels_N`` are the head's. Every rank must call it with all embeddings, and gets the same.
    """
    parts = zip(embeddings_ND.split(_PROBES_AT_ONCE), labels_N.split(_PROBES_AT_ONCE), strict=True)
    found = [nearest_classes(head, F.normalize(e_BD.float()), labels_B) for e_BD, labels_B in parts]
    own_N, other_N = (
        torch.cat([getattr(f, key) for f in found]).double().cpu() for key in ("own_P", "other_P")
    )
    taken_N, labels_N = torch.cat([f.other_class_P for f in found]).cpu(), labels_N.cpu()
    classes, place_N, counts = labels_N.unique(return_inverse=True, return_counts=True)

    def mean(values_N: Tensor) -> list[float]:
        return (
            torch.zeros(len(classes), dtype=torch.float64).index_add_(0, place_N, values_N) / counts
        ).tolist()

    is_right, cosine, margin = mean((own_N > other_N).double()), mean(own_N), mean(own_N - other_N)
    by_class = [taken.mode().values for taken in taken_N[place_N.argsort(stable=True)].split(counts.tolist())]
    name = partial(class_name, names=class_names)
    results = [
        ClassResult(name(c), int(n), right, cos, gap, name(int(taken)), c)
        for c, n, right, cos, gap, taken in zip(
            classes.tolist(), counts.tolist(), is_right, cosine, margin, by_class, strict=True
        )
    ]
    ranked = sorted(results, key=lambda result: (result.accuracy, result.margin))
    worst = ranked[:WORST] if head.is_per_image else []
    labels_N = labels_N.to(embeddings_ND.device)
    losses = [_loss_of(head, embeddings_ND[labels_N == each.label], each.label) for each in worst]
    return [dataclasses.replace(each, loss=loss) for each, loss in zip_longest(ranked, losses)]


def _loss_of(head: Any, embeddings_ND: Tensor, label: int) -> float:
    """Return the mean loss of images of one class. Every rank must call it."""
    total = 0.0
    for embeddings_BD in embeddings_ND.split(_IMAGES_AT_ONCE):
        labels_B = torch.full((len(embeddings_BD),), label, device=embeddings_BD.device)
        total += len(labels_B) * float(head.of_embeddings(embeddings_BD, labels_B).loss)
    return total / len(embeddings_ND)


def effective_rank(features_ND: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares: 1 for a line, D for an even use of all.

    Roy and Vetterli 2007; as a measure of collapse: RankMe (arXiv 2210.02885).
    """
    x_ND = F.normalize(features_ND.double())
    share_D = torch.linalg.eigvalsh(x_ND.T @ x_ND).clamp(min=0).sqrt()
    share_D = share_D / share_D.sum()
    return float(torch.exp(-torch.special.xlogy(share_D, share_D).sum()))
