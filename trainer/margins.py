"""Softmax losses of cosines: what each changes in the COCO loss, as functions of single logits.

With c_k = cos theta_k between the feature and the centroid of class k, s the scale and y the label, the loss
of an image is

    L = log( exp(t) + sum_{j != y} exp(z_j) ) - t + penalty,

and COCO has t = s c_y, z_j = s c_j and no penalty. The class-parallel head makes the sum, a tile of classes
at a time; a class of this file says what t, z_j and the penalty are. ``tests/test_margins.py`` holds the same
formulas longhand.

A step of training calls ``target``, ``others`` and ``penalty`` as often as it likes and gets the same each
time, and ``observe`` once, *after* the last of them. All are called with the whole global batch, equal on
every rank, so running statistics and random margins are equal on every rank too; nothing communicates.
Statistics that a step uses include its own batch, as in the papers' code (but see AdaCos).

Angles are acos of cosines cut to +-(1 - 5e-7): nearer than 0.001 rad to 0 or pi the angle stands still and
its gradient is 0, where that of acos would be infinite. Inputs are float32 or float64.

Legend: B images of the global batch, T any leading dimensions (the classes of a tile).
"""
# ruff: noqa: D102 - a method that overrides one of the base class is explained there, its formula by its class.

import inspect
from math import isfinite, log, pi
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.errors import UserError

_COSINE_LIMIT = 1.0 - 5e-7
_HIGHEST_SCALE = 1000.0
_HIGHEST_LEARNED_SCALE = 128.0  # what the fused head's exponentials can hold


class CosineSoftmax(nn.Module):
    """COCO (arXiv 1710.00870), which is NormFace (1704.06369) with a fixed scale: t = s c_y. Base of all."""

    needs_target_first: bool = False
    """Whether ``others`` looks at the target cosines: the head must have them before the first tile."""

    observes_sums: bool = False
    """Whether ``observe`` uses its last argument, which costs the autograd head a pass over the logits."""

    learns: Literal["", "scale", "bias"] = ""
    """Which number ``learn`` moves, if any."""

    is_unified: bool = False
    """Whether each class is judged by itself: L = softplus(bias - t) + sum_{j != y} softplus(z_j - bias)."""

    bias: Tensor
    weight: float
    """Threshold of a unified loss, and the weight of its other classes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        """Return t from the target cosines and the lengths of the embeddings; differentiable in both."""
        return self.scale * cosine_B

    def others(self, z_TB: Tensor, target_cosine_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of other classes from z = s c_j, and d(out)/dz, where None is 1 everywhere.

        ``target_cosine_B`` is seen as a constant; autograd may go through ``z_TB``.
        """
        return z_TB, None

    def penalty(self, norm_B: Tensor) -> Tensor | None:
        """Return what is added to the loss of each image; differentiable. None: nothing."""
        return None

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        """Move the running statistics by one step; the last argument is log sum_{j != y} exp(s c_j)."""

    def learn(self, cosine_B: Tensor, log_sum_others_B: Tensor, slope_B: Tensor) -> None:
        """Move the learned number by one step of gradient descent, after ``observe``.

        ``slope_B``: of log sum_{j != y} exp(s c_j) in the scale, or of sum_{j != y} softplus(z_j - b) in b.
        """

    def highest_logit(self) -> float:
        """Return a bound of |z_j| as ``others`` returns it, for the choice of a safe shift."""
        return self.scale


class NormFace(CosineSoftmax):
    """NormFace (1704.06369) with its learned scale: COCO, and s <- s - rate dL/ds after every step.

    dL/ds = mean_i (1 - p_iy) (sum_{j != y} p_ij c_ij / (1 - p_iy) - c_iy): negative while the target is the
    nearest, so s grows as long as there is anything to gain. ``rate`` does not follow the schedule.
    """

    learns = "scale"
    learned_scale: Tensor

    def __init__(self, scale: float, rate: float = 1.0) -> None:
        super().__init__(scale)
        self.rate = _within("rate", rate)

    @property
    def scale(self) -> float:  # type: ignore[override]
        """The scale of the current step."""
        return float(self.learned_scale)

    @scale.setter
    def scale(self, scale: float) -> None:
        self.register_buffer("learned_scale", torch.tensor(scale, dtype=torch.float64))

    def learn(self, cosine_B: Tensor, log_sum_others_B: Tensor, slope_B: Tensor) -> None:
        cosine_B = cosine_B.double()
        miss_B = torch.sigmoid(log_sum_others_B.double() - self.scale * cosine_B)
        slope = (miss_B * (slope_B.double() - cosine_B)).mean()
        self.learned_scale = (self.learned_scale - self.rate * slope).clamp(1.0, _HIGHEST_LEARNED_SCALE)


class UniFace(CosineSoftmax):
    """UniFace (ICCV 2023, unified cross-entropy): one threshold b for all classes and images.

    L = softplus(b - s (c_y - m)) + l sum_{j != y} softplus(s c_j - b), and b <- b - rate dL/db after every
    step, from b = log(10 K). Unlike a softmax it asks every other class to stay below the same threshold.
    """

    learns = "bias"
    is_unified = True

    def __init__(
        self, scale: float, margin: float = 0.4, weight: float = 1.0, rate: float = 0.1, *, num_classes: int
    ) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 0.0, 2.0)
        self.weight = _within("weight", weight, 1e-6)  # the fused head divides by it
        self.rate = _within("rate", rate)
        self.register_buffer("bias", torch.tensor(log(10.0 * num_classes), dtype=torch.float64))

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * (cosine_B - self.margin)

    def learn(self, cosine_B: Tensor, log_sum_others_B: Tensor, slope_B: Tensor) -> None:
        miss_B = torch.sigmoid(self.bias - self.target(cosine_B.double(), cosine_B))
        self.bias = self.bias - self.rate * (miss_B + self.weight * slope_B.double()).mean()


class CosFace(CosineSoftmax):
    """CosFace (1801.09414), AM-Softmax (1801.05599): t = s (c_y - m)."""

    def __init__(self, scale: float, margin: float = 0.35) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 0.0, 2.0)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * (cosine_B - self.margin)


class ArcFace(CosineSoftmax):
    """ArcFace (1801.07698): t = s cos(theta_y + m), and s (c_y - m sin m) where theta_y + m > pi.

    m is in radians. The gradient is that of the formula; insightface's code takes dt/dc_y = s instead.
    """

    def __init__(self, scale: float, margin: float = 0.5) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 0.0, pi / 2)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * _add_angle(cosine_B, torch.full_like(cosine_B, self.margin))


class Combined(CosineSoftmax):
    """Combined margins (1801.07698, eq. 4): t = s (psi(m1 theta_y + m2) - m3).

    psi is cos, continued beyond pi as in SphereFace: the paper leaves open what happens there, and cos itself
    would rise again. So (1, m2, 0) is ArcFace only up to theta_y + m2 = pi.
    """

    def __init__(self, scale: float, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2) -> None:
        super().__init__(scale)
        self.m1 = _within("m1", m1, 0.0, 16.0)
        self.m2 = _within("m2", m2, 0.0, pi)
        self.m3 = _within("m3", m3, 0.0, 2.0)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * (_psi(self.m1 * _angle(cosine_B) + self.m2) - self.m3)


class SphereFace(CosineSoftmax):
    """SphereFace (1704.08063): t = s (lambda c_y + psi(m theta_y)) / (1 + lambda).

    psi(phi) = (-1)^k cos(phi) - 2k with k = floor(phi / pi) falls all the way. lambda = max(lambda_min,
    lambda_start / (1 + lambda_decay n)) after n steps; lambda_start = lambda_min = 0 is the margin alone.
    Where the paper has the length of the embedding this has s, as in opensphere: features are normalised.
    """

    step: Tensor

    def __init__(
        self,
        scale: float,
        margin: float = 4.0,
        lambda_start: float = 1000.0,
        lambda_decay: float = 0.12,
        lambda_min: float = 5.0,
    ) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 1.0, 16.0)
        self.lambda_start = _within("lambda_start", lambda_start)
        self.lambda_decay = _within("lambda_decay", lambda_decay)
        self.lambda_min = _within("lambda_min", lambda_min)
        self.register_buffer("step", torch.tensor(0))

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        weight = self.lambda_start / (1.0 + self.lambda_decay * self.step.double())
        weight = weight.clamp(min=self.lambda_min)
        return self.scale * (weight * cosine_B + _psi(self.margin * _angle(cosine_B))) / (1.0 + weight)

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        self.step = self.step + 1


class CurricularFace(ArcFace):
    """CurricularFace (2004.00288): t of ArcFace; z_j = s c_j (T + c_j) where c_j > cos(theta_y + m).

    T, the buffer ``t``, is the running mean of the target cosine: 0 at first, T <- T + momentum (mean - T).
    """

    needs_target_first = True
    t: Tensor

    def __init__(self, scale: float, margin: float = 0.5, momentum: float = 0.01) -> None:
        super().__init__(scale, margin)
        self.momentum = _within("momentum", momentum, 0.0, 1.0)
        self.register_buffer("t", torch.tensor(0.0, dtype=torch.float64))

    def others(self, z_TB: Tensor, target_cosine_B: Tensor) -> tuple[Tensor, Tensor | None]:
        cosine_B = target_cosine_B.detach()
        t = self._moved(cosine_B)
        is_hard_TB = z_TB > self.scale * torch.cos(_angle(cosine_B) + self.margin)
        out_TB = torch.where(is_hard_TB, z_TB * (t + z_TB / self.scale), z_TB)
        return out_TB, torch.where(is_hard_TB, t + z_TB.detach() * (2.0 / self.scale), 1.0)

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        self.t = self._moved(cosine_B)

    def highest_logit(self) -> float:
        return 2.0 * self.scale

    def _moved(self, cosine_B: Tensor) -> Tensor:
        return torch.lerp(self.t, cosine_B.detach().double().mean(), self.momentum)


class AdaFace(CosineSoftmax):
    """AdaFace (2204.00964): t = s (cos(theta_y - m q) - m - m q), q = clip(h (|x| - mu) / sigma, -1, 1).

    mu and sigma are running mean and deviation of |x|, the length of the embedding; q has no gradient. As in
    the authors' code: mu and sigma begin at 20 and 100, |x| is cut to 0.001..100, 0.001 is added to sigma,
    and the angle theta_y - m q is cut to 0.001 .. pi - 0.001. (Their code also cuts all cosines to +-0.999.)
    """

    norm_mean: Tensor
    norm_deviation: Tensor

    def __init__(self, scale: float, margin: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 0.0, pi / 2)
        self.h = _within("h", h)
        self.momentum = _within("momentum", momentum, 0.0, 1.0)
        self.register_buffer("norm_mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("norm_deviation", torch.tensor(100.0, dtype=torch.float64))

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        mean, deviation = self._moved(norm_B)
        quality_B = (norm_B.detach().clamp(1e-3, 100.0) - mean) / (deviation + 1e-3)
        margin_B = self.margin * (self.h * quality_B).clamp(-1.0, 1.0)
        angle_B = (_angle(cosine_B) - margin_B).clamp(1e-3, pi - 1e-3)
        return self.scale * (torch.cos(angle_B) - (self.margin + margin_B))

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        self.norm_mean, self.norm_deviation = self._moved(norm_B)

    def _moved(self, norm_B: Tensor) -> tuple[Tensor, Tensor]:
        norm_B = norm_B.detach().double().clamp(1e-3, 100.0)
        deviation = norm_B.std(correction=min(1, len(norm_B) - 1))  # one image deviates by 0, not by NaN
        return (
            torch.lerp(self.norm_mean, norm_B.mean(), self.momentum),
            torch.lerp(self.norm_deviation, deviation, self.momentum),
        )


class MagFace(CosineSoftmax):
    """MagFace (2103.06627): t = s cos(theta_y + m(a)) where c_y > 0, else s c_y; penalty g (a / u^2 + 1 / a).

    a is |x|, the length of the embedding, cut to ``norm_low`` .. ``norm_high`` = u; m(a) rises linearly from
    ``margin_low`` to ``margin_high`` there. An embedding out of those bounds gets no gradient along itself.
    """

    def __init__(
        self,
        scale: float,
        norm_low: float = 10.0,
        norm_high: float = 110.0,
        margin_low: float = 0.45,
        margin_high: float = 0.8,
        penalty_weight: float = 35.0,
    ) -> None:
        super().__init__(scale)
        self.norm_low = _within("norm_low", norm_low, 1e-3)
        self.norm_high = _within("norm_high", norm_high, norm_low + 1e-3)
        self.margin_low = _within("margin_low", margin_low, 0.0, pi / 2)
        self.margin_high = _within("margin_high", margin_high, margin_low, pi / 2)
        self.penalty_weight = _within("penalty_weight", penalty_weight)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        rise = (self.margin_high - self.margin_low) / (self.norm_high - self.norm_low)
        margin_B = self.margin_low + rise * (norm_B.clamp(self.norm_low, self.norm_high) - self.norm_low)
        return self.scale * torch.where(cosine_B > 0, torch.cos(_angle(cosine_B) + margin_B), cosine_B)

    def penalty(self, norm_B: Tensor) -> Tensor | None:
        norm_B = norm_B.clamp(self.norm_low, self.norm_high)
        return self.penalty_weight * (norm_B / self.norm_high**2 + 1.0 / norm_B)


class _ElasticFace(CosineSoftmax):
    """ElasticFace (2109.09416): a margin for every image, drawn anew in every step from N(margin, sigma).

    A margin is a function of (seed, step, position in the global batch). ``plus`` (ElasticFace+) deals the
    margins of a batch out by cosine: the smallest cosine gets the largest. (The code in circulation has
    ``sorted_margin[order]``, which lacks the inverse of the permutation and deals them out at random.)
    """

    step: Tensor

    def __init__(self, scale: float, margin: float, sigma: float, plus: bool, seed: int) -> None:
        super().__init__(scale)
        self.margin = _within("margin", margin, 0.0, pi / 2)
        self.sigma = _within("sigma", sigma, 0.0, 1.0)
        if plus not in (False, True):
            raise UserError(f"loss.margins.plus must be true or false, got {plus}")
        self.plus, self.seed = bool(plus), seed
        self.register_buffer("step", torch.tensor(0))

    def margins_B(self, cosine_B: Tensor) -> Tensor:
        """Return the margins of this step."""
        # torch keeps the low 32 bits of a seed, so both numbers must reach them. Its float32 draws differ
        # between CPUs with and without AVX2, its float64 draws do not.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + int(self.step)) % 2**32)
        normal_B = torch.randn(len(cosine_B), generator=generator, dtype=torch.float64)
        margin_B = (self.margin + self.sigma * normal_B).to(cosine_B)
        if not self.plus:
            return margin_B
        order_B = torch.argsort(cosine_B.detach(), descending=True, stable=True)
        return torch.empty_like(margin_B).index_copy(0, order_B, margin_B.sort().values)

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        self.step = self.step + 1


class ElasticArcFace(_ElasticFace):
    """ElasticFace-Arc (2109.09416): t of ArcFace with random m; the paper's "+" has sigma 0.0175."""

    def __init__(
        self, scale: float, margin: float = 0.5, sigma: float = 0.05, plus: bool = False, *, seed: int
    ) -> None:
        super().__init__(scale, margin, sigma, plus, seed)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * _add_angle(cosine_B, self.margins_B(cosine_B))


class ElasticCosFace(_ElasticFace):
    """ElasticFace-Cos (2109.09416): t of CosFace with random m; the paper's "+" has sigma 0.02."""

    def __init__(
        self, scale: float, margin: float = 0.35, sigma: float = 0.05, plus: bool = False, *, seed: int
    ) -> None:
        super().__init__(scale, margin, sigma, plus, seed)

    def target(self, cosine_B: Tensor, norm_B: Tensor) -> Tensor:
        return self.scale * (cosine_B - self.margins_B(cosine_B))


class AdaCos(CosineSoftmax):
    """Dynamic AdaCos (1905.00292): COCO whose scale follows the batch; begin with scale = sqrt(2) log(K-1).

    s <- log( mean_i sum_{j != y} exp(s c_ij) ) / cos(min(pi/4, median_i theta_i,y)), at least 1, after each
    step: a step uses the scale that the one before it left, where the paper's moves before it is used.
    ``scale`` is the number of now, so read it in every step. (AdaCos with a fixed scale is CosineSoftmax.)

    While angles are wide, s grows by up to sqrt(2) in every step if other cosines reach 1, as they do in 2
    or 3 dimensions: the formula runs away. Beyond 1000 nothing can be trained and ``scale`` raises UserError.
    """

    observes_sums = True

    dynamic_scale: Tensor

    @property
    def scale(self) -> float:  # type: ignore[override]
        """The scale of the current step."""
        scale = float(self.dynamic_scale)
        if not scale <= _HIGHEST_SCALE:
            remedy = "use coco, whose scale is fixed, or a wider embedding"
            raise UserError(f"loss.name is adacos and its scale has run away to {scale:.3g}: {remedy}")
        return scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.register_buffer("dynamic_scale", torch.tensor(scale, dtype=torch.float64))

    def observe(self, cosine_B: Tensor, norm_B: Tensor, log_sum_others_B: Tensor) -> None:
        log_mean = torch.logsumexp(log_sum_others_B.detach().double(), 0) - log(len(cosine_B))
        median = _angle(cosine_B.detach().double()).median()
        self.dynamic_scale = (log_mean / torch.cos(median.clamp(max=pi / 4))).clamp(min=1.0)


MARGINS: dict[str, type] = {
    "coco": CosineSoftmax,
    "normface": NormFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": Combined,
    "sphereface": SphereFace,
    "curricularface": CurricularFace,
    "adaface": AdaFace,
    "magface": MagFace,
    "elasticface_arc": ElasticArcFace,
    "elasticface_cos": ElasticCosFace,
    "adacos": AdaCos,
    "uniface": UniFace,
}
"""``loss.name`` -> its class, whose keyword arguments are the keys of ``loss.margins``."""


def build_margin(
    name: str, scale: float, seed: int, /, *, num_classes: int = 2, **numbers: float
) -> CosineSoftmax:
    """Return the loss of that name with ``loss.margins`` as ``numbers``; those not given are the papers'.

    Raises UserError for a name that does not exist, and for a number that the loss does not take or allow.
    """
    if name not in MARGINS:
        raise UserError(f"loss.name must be one of {', '.join(MARGINS)}; got {name!r}")
    parameters = inspect.signature(MARGINS[name]).parameters
    given = {key: value for key, value in (("seed", seed), ("num_classes", num_classes)) if key in parameters}
    taken = [key for key in parameters if key != "scale" and key not in given]
    for key, value in numbers.items():
        if key not in taken:
            raise UserError(f"loss.margins.{key} = {value}: {name} takes {', '.join(taken) or 'no numbers'}")
    return MARGINS[name](scale, **numbers, **given)


def _within(key: str, value: float, low: float = 0.0, high: float = float("inf")) -> float:
    if not (isfinite(value) and low <= value <= high):
        raise UserError(f"loss.margins.{key} must be a number in {low:g}..{high:g}, got {value}")
    return float(value)


def _angle(cosine_B: Tensor) -> Tensor:
    return torch.acos(cosine_B.clamp(-_COSINE_LIMIT, _COSINE_LIMIT))


def _add_angle(cosine_B: Tensor, margin_B: Tensor) -> Tensor:
    """Return cos(theta + m), and c - m sin m where theta + m > pi: falls for all m up to pi / 2."""
    angle_B = _angle(cosine_B) + margin_B
    return torch.where(angle_B > pi, cosine_B - margin_B * torch.sin(margin_B), torch.cos(angle_B))


def _psi(angle_B: Tensor) -> Tensor:
    """Return (-1)^k cos(angle) - 2k with k = floor(angle / pi): cos up to pi, falling for ever."""
    k_B = torch.floor(angle_B.detach() / pi)
    return (1.0 - 2.0 * (k_B % 2)) * torch.cos(angle_B) - 2.0 * k_B
