"""What the reader of a report is told: of every picture what to look for, of every figure what it means."""

from collections.abc import Iterable, Sequence
from pathlib import Path

AREAS = {
    "train": "What the loss saw of the training images, averaged over a batch.",
    "eval": "The test sets, while training.",
    "head": "How the centroids lie to each other.",
    "perf": "What it cost: images of all ranks, seconds of a step, the part of it spent waiting for data.",
}
"""By area of metrics, in the order they are shown."""

PICTURES = {
    "roc": "The same class or not, over all pairs. TAR: the part of the pairs of one class that is accepted "
    "where FAR of the pairs of two are. The curve should stay high to the left; it is thin where fewer than "
    "ten errors make it up.",
    "cmc": "An image is looked up among all others of its set: is one of its class among the k nearest?",
    "cosines": "Between images of one class and of different ones: the less the two overlap, the better.",
    "rays": "The embeddings as they are, not normalised. Images of a class should lie along a ray, and the "
    "rays far from each other.",
    "axes": "Unit embeddings, projected; colours are classes. Two axes show only their part of the variance.",
    "t-sne": "Near points are alike; distances between far groups, and sizes of groups, mean nothing.",
    "near": "The closest pairs of centroids. Near 1 the two are probably one person or thing with two "
    "labels: launch/classes.py merge joins them.",
    "weak": "The classes of the lowest accuracy, then of the lowest margin. Loss: mean over the images of "
    "the class, where an image has one without others. Margin: mean cosine to the own centroid less that "
    "of the nearest other.",
    "centroid-gram": "The cosine of each centroid to each other. Training spreads them evenly, as far as the "
    "dimensions let it.",
    "centroid-cosines": "Every pair of two centroids. Pairs far to the right of the rest may be one class "
    "twice.",
    "sizes": "If points rise to the right, more images would help the classes that have few.",
}

FIGURES = {
    "loss": "mean loss over the test images, by the head's own formula; losses of pairs see 1024 at a time",
    "accuracy": "images whose own class has the highest score of the head; of a protocol: docs/judging.md",
    "nearest_centroid": "images whose own centroid is the nearest by angle",
    "nearest_centre_cosine": "images whose own class centre is the nearest by angle",
    "nearest_centre_euclidean": "images whose own class centre is the nearest by distance",
    "cosine_intra": "mean cosine of two images of one class",
    "cosine_inter": "mean cosine of two images of different classes",
    "effective_rank": "dimensions that the embeddings use: 1 on a line, all of them if used evenly",
    "auc": "how often a pair of one class scores higher than a pair of two",
    "best_accuracy": "the same class or not, at the best threshold, both kinds of pairs weighing the same",
    "eer": "the error rate where false accepts are as frequent as false rejects",
    "tar@far": "pairs of one class that are accepted where that part of the pairs of two is",
    "rank": "images with one of their class among the so many nearest others",
    "cosine_nearest_mean": "mean, over centroids, of the cosine to the nearest other",
    "cosine_nearest_max": "the cosine of the closest two centroids",
    "cosine_nearest_above_0.7": "the part of the centroids with another closer than 0.7: a class twice?",
}
"""By the name of a figure up to its number: ``rank`` of ``rank5``."""


def titles_of(folders: Iterable[Path]) -> list[str]:
    """Return what runs are called beside each other: names of their folders, or paths if names are equal."""
    folders = list(folders)
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def class_name(label: int, names: Sequence[str]) -> str:
    """Return the name of a class, or its number: a head may have more classes than the data has names."""
    return names[label] if label < len(names) else str(label)
