"""The scale alpha of the cosine softmax: three rules and what each can reach. Derivation: docs/coco.md.

The best loss of K classes with unit features on their unit centroids is log(1 + sum exp(-alpha * gap)); the
rules differ in the gap between the target cosine and the others that they think possible.
"""

from math import exp, log, log1p, sqrt

PAPER_LOSS = log1p(exp(-6.0))
"""The loss 0.0025 that "0.5 log(K-1) + 3" stands for, and that the simplex rule really reaches."""


def scale_of(rule: float | str, num_classes: int) -> float:
    """Return alpha: a number as it is, or "paper", "simplex", "adacos" applied to the number of classes K."""
    if not isinstance(rule, str):
        return float(rule)
    rules = {"paper": paper_scale, "simplex": simplex_scale, "adacos": adacos_scale}
    return rules[rule](num_classes)


def paper_scale(num_classes: int) -> float:
    """Return 0.5 log(K-1) + 3 (arXiv 1710.00870): a necessary bound only.

    It supposes every other centroid opposite to the feature (gap 2), which no more than 2 classes can be.
    """
    return 0.5 * log(num_classes - 1) + 3.0


def simplex_scale(num_classes: int, loss: float = PAPER_LOSS) -> float:
    """Return (K-1)/K log((K-1)/(e^loss - 1)): ``loss`` is reached by centroids on a simplex.

    There the gap is K/(K-1), which needs D >= K-1. For K = 2 it equals the paper's rule, for large K it is
    almost twice that.
    """
    return (num_classes - 1) / num_classes * log((num_classes - 1) / (exp(loss) - 1.0))


def adacos_scale(num_classes: int) -> float:
    """Return the fixed scale of AdaCos, sqrt(2) log(K-1), at least 1 (the formula gives 0 for K = 2)."""
    return max(1.0, sqrt(2.0) * log(num_classes - 1))


def simplex_loss(num_classes: int, scale: float) -> float:
    """Return the lowest loss that K classes can reach at this scale when D >= K-1 (simplex centroids)."""
    gap = num_classes / (num_classes - 1)
    return log1p((num_classes - 1) * exp(-scale * gap))
