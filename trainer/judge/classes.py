"""Which class is it? Of all that a head or a gallery has, or of a few that are known by a few examples.

Dimensions: N images, K classes, D embedding, M confused pairs of classes, E episodes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.bench import Bench, Figures, interval_of
from trainer.errors import UserError
from trainer.protocols.closed_set import class_means, closed_set
from trainer.protocols.few_shot import few_shot


def judge_closed_set(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/closed_set.py``."""
    found = bench.embed(bench.open("data"))
    names = found.images.class_names
    if bench.config.gallery is not None:
        gallery = bench.embed(bench.open("gallery"))
        known = gallery.images.class_names
        num_classes = len(known) or int(gallery.labels_N.max()) + 1
        centroids_KD = class_means(gallery.embeddings_ND, gallery.labels_N, num_classes)
    else:
        model = bench.required_model("data")
        if model.centroids is None:
            raise UserError(f"{bench.prefix}gallery: needed where there is no head, to make class means of")
        centroids_KD, known = model.centroids(), model.class_names
    if len(centroids_KD) < 2:
        raise UserError(
            f"{bench.prefix}data: of one class, all of it is right: there is nothing to tell apart"
        )
    labels_N = found.labels_N
    if names and known:
        label_of = {name: label for label, name in enumerate(known)}
        if unknown := [name for name in names if name not in label_of]:
            raise UserError(f"{bench.prefix}data: class {unknown[0]!r} has no centroid")
        labels_N = torch.tensor([label_of[name] for name in names], device=labels_N.device)[labels_N]
    ks = bench.config.ks or (1, 5)
    if bench.config.ks and max(ks) >= len(centroids_KD):
        raise UserError(f"{bench.prefix}ks: {max(ks)} of {len(centroids_KD)} classes: any image is a hit")
    result = closed_set(found.embeddings_ND, labels_N, centroids_KD, ks, bench.sharing)
    yield "num_images", float(len(labels_N))
    yield from bench.left_out(("failed_images", len(found.images) - len(labels_N)))
    by_distance = bench.config.gallery is not None  # rows of a head are directions, not points
    hits = {name: hit for name, hit in result.hits.items() if by_distance or not name.endswith("_euclidean")}
    yield from bench.means(hits, labels_N)
    yield from _most_confused(labels_N, result.predicted_N, known)


def _most_confused(labels_N: Tensor, predicted_N: Tensor, names: Sequence[str], most: int = 10) -> Figures:
    """Yield the pairs of classes that are most often taken for one another, with how often."""
    wrong = labels_N != predicted_N
    pairs_M2, counts_M = torch.stack([labels_N, predicted_N], 1)[wrong].unique(dim=0, return_counts=True)
    for row in counts_M.argsort(descending=True, stable=True)[:most].tolist():
        true, taken = (names[label] if names else str(label) for label in pairs_M2[row].tolist())
        yield f"confused/{true}>{taken}", float(counts_M[row])


def judge_few_shot(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/few_shot.py``."""
    config, found = bench.config, bench.embed(bench.open("data"))
    names = found.images.class_names
    if config.within and not names:
        raise UserError(f"{bench.prefix}within: the classes of {config.data} have no names")
    groups = [name.rpartition("/")[0] for name in names] if config.within else None
    counts = config.ways, config.shots, config.queries, config.episodes
    accuracy_E = few_shot(found.features_ND, found.labels_N, *counts, groups, sharing=bench.sharing)
    yield from bench.left_out(("failed_images", len(found.images) - len(found.labels_N)))
    mean = float(accuracy_E.mean())
    yield "accuracy", mean
    if len(accuracy_E) > 1:
        half = 1.96 * float(accuracy_E.std()) / math.sqrt(len(accuracy_E))
        yield from interval_of("accuracy", (mean - half, mean + half))
