"""Learning rate by step: pure arithmetic."""

from math import cos, pi


def lr_at(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, shape: str, final_fraction: float
) -> float:
    """Return the learning rate of step ``step``, counted from 0 to ``total_steps - 1``.

    Linear from ``peak / warmup_steps`` to ``peak`` over the warm-up, then from ``peak`` to
    ``peak * final_fraction`` as a half ``"cosine"``, a ``"linear"`` ramp, or not at all (``"constant"``).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    left = 0.5 * (1 + cos(pi * done)) if shape == "cosine" else 1 - done
    return peak * (final_fraction + (1 - final_fraction) * left)
