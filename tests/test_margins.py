"""The margin losses against the papers' formulas, written with math.acos and math.cos on single numbers.

Legend: B images, K classes, T points of a grid.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.margins import MARGINS, CosineSoftmax, ElasticArcFace, ElasticCosFace, build_margin

SCALE, SEED = 16.0, 3
# Both sides of every kink: theta + m = pi (c = -0.878), c = 0, k pi / 4, and close to +-1.
COSINES = (-0.99999, -0.95, -0.9, -0.8, -0.6, -0.2, -0.01, 0.02, 0.3, 0.69, 0.72, 0.9, 0.97, 0.99999)
NORMS = (0.5, 5.0, 11.0, 25.0, 40.0, 90.0, 109.0, 150.0, 30.0, 60.0, 12.0, 2.0, 99.0, 70.0)
STEPS = 7

Numbers = dict[str, float]
Formula = Callable[[float, float, "Situation"], float]


@dataclass(frozen=True)
class Situation:
    """What t depends on besides its own cosine and length."""

    step: int
    margin: float
    """The margin drawn for the image, of ElasticFace."""
    mean: float
    deviation: float
    """Of the lengths of embeddings, this step's included."""


def arc(c: float, m: float) -> float:
    theta = math.acos(c)
    return c - m * math.sin(m) if theta + m > math.pi else math.cos(theta + m)


def psi(phi: float) -> float:
    k = math.floor(phi / math.pi)
    return (-1) ** k * math.cos(phi) - 2 * k


def annealed(c: float, m: float, weight: float) -> float:
    return (weight * c + psi(m * math.acos(c))) / (1 + weight)


def ada(c: float, norm: float, m: float, h: float, now: Situation) -> float:
    quality = (min(max(norm, 1e-3), 100.0) - now.mean) / (now.deviation + 1e-3) * h
    quality = min(max(quality, -1.0), 1.0)
    angle = min(max(math.acos(c) - m * quality, 1e-3), math.pi - 1e-3)
    return math.cos(angle) - (m + m * quality)


def mag(c: float, norm: float) -> float:
    a = min(max(norm, 10.0), 110.0)
    m = (0.8 - 0.45) / (110 - 10) * (a - 10) + 0.45
    return math.cos(math.acos(c) + m) if c > 0 else c


# id -> (name, numbers, t / s). The defaults of a loss are checked where numbers are empty.
CASES: dict[str, tuple[str, Numbers, Formula]] = {
    "coco": ("coco", {}, lambda c, norm, now: c),
    "cosface": ("cosface", {}, lambda c, norm, now: c - 0.35),
    "cosface .4": ("cosface", {"margin": 0.4}, lambda c, norm, now: c - 0.4),
    "arcface": ("arcface", {}, lambda c, norm, now: arc(c, 0.5)),
    "arcface .3": ("arcface", {"margin": 0.3}, lambda c, norm, now: arc(c, 0.3)),
    "arcface 90 degrees": ("arcface", {"margin": math.pi / 2}, lambda c, norm, now: arc(c, math.pi / 2)),
    "combined": ("combined", {}, lambda c, norm, now: psi(math.acos(c) + 0.3) - 0.2),
    "combined 1.4": (
        "combined",
        {"m1": 1.4, "m2": 0.1, "m3": 0.05},
        lambda c, norm, now: psi(1.4 * math.acos(c) + 0.1) - 0.05,
    ),
    "sphereface": (
        "sphereface",
        {},
        lambda c, norm, now: annealed(c, 4, max(5, 1000 / (1 + 0.12 * now.step))),
    ),
    "sphereface at lambda_min": (
        "sphereface",
        {"lambda_start": 6, "lambda_decay": 0.1},
        lambda c, norm, now: annealed(c, 4, max(5, 6 / (1 + 0.1 * now.step))),
    ),
    "sphereface without lambda": (
        "sphereface",
        {"margin": 1.7, "lambda_start": 0, "lambda_min": 0},
        lambda c, norm, now: psi(1.7 * math.acos(c)),
    ),
    "curricularface": ("curricularface", {}, lambda c, norm, now: arc(c, 0.5)),
    "adaface": ("adaface", {}, lambda c, norm, now: ada(c, norm, 0.4, 0.333, now)),
    "adaface, all qualities": (
        "adaface",
        {"margin": 0.3, "h": 0.9, "momentum": 1.0},
        lambda c, norm, now: ada(c, norm, 0.3, 0.9, now),
    ),
    "magface": ("magface", {}, lambda c, norm, now: mag(c, norm)),
    "elasticface_arc": ("elasticface_arc", {}, lambda c, norm, now: arc(c, now.margin)),
    "elasticface_arc+": (
        "elasticface_arc",
        {"sigma": 0.0175, "plus": 1},
        lambda c, norm, now: arc(c, now.margin),
    ),
    "elasticface_cos": ("elasticface_cos", {}, lambda c, norm, now: c - now.margin),
    "adacos": ("adacos", {}, lambda c, norm, now: c),
    "normface": ("normface", {}, lambda c, norm, now: c),
    "uniface": ("uniface", {}, lambda c, norm, now: c - 0.4),
}
each_case = pytest.mark.parametrize("case", CASES)
each_name = pytest.mark.parametrize("name", MARGINS)


def built(case: str) -> CosineSoftmax:
    name, numbers, _ = CASES[case]
    return build_margin(name, SCALE, SEED, **numbers)


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(size: int = 14) -> tuple[Tensor, Tensor]:
    return tensor(COSINES[:size]).requires_grad_(), tensor(NORMS[:size]).requires_grad_()


def walk(margin: CosineSoftmax, steps: int = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Take steps of training with batches of 5; return what was observed."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(steps):
        cosine_B = torch.rand(5, generator=generator, dtype=torch.float64) * 1.6 - 0.8
        norm_B = torch.rand(5, generator=generator, dtype=torch.float64) * 80 + 0.5
        log_sum_B = torch.rand(5, generator=generator, dtype=torch.float64) + 5
        margin.observe(cosine_B, norm_B, log_sum_B)
        seen.append((cosine_B, norm_B, log_sum_B))
    return seen


def statistics(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and unbiased deviation of lengths, cut as AdaFace cuts them."""
    values = [min(max(value, 1e-3), 100.0) for value in values]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def situations(
    case: str, margin: CosineSoftmax, seen: list[tuple[Tensor, Tensor, Tensor]], cosine_B: Tensor, norms: list
) -> list[Situation]:
    """Return one situation for each image, after the steps of ``seen``."""
    momentum = CASES[case][1].get("momentum", 0.01)
    mean, deviation = 20.0, 100.0
    for lengths in [*(norm_B.tolist() for _, norm_B, _ in seen), norms]:
        now = statistics(lengths)
        mean, deviation = (
            (1 - momentum) * old + momentum * new for old, new in zip((mean, deviation), now, strict=True)
        )
    draws = [0.0] * len(norms)
    if isinstance(margin, ElasticArcFace | ElasticCosFace):
        draws = margin.margins_B(cosine_B).tolist()
    return [Situation(len(seen), draw, mean, deviation) for draw in draws]


def slope_of(function: Callable[[float], float], x: float, step: float) -> float:
    return (function(x + step) - function(x - step)) / (2 * step)


@each_case
def test_target_logit_and_its_slopes_are_those_of_the_formula(case: str) -> None:
    name, _, formula = CASES[case]
    margin = built(case)
    seen = walk(margin)
    scale = margin.scale
    cosine_B, norm_B = batch()
    t_B = margin.target(cosine_B, norm_B)
    t_B.sum().backward()
    # A length has a gradient in MagFace only; in AdaFace it is detached, elsewhere it is not there.
    norm_slopes = [0.0] * len(NORMS) if norm_B.grad is None else norm_B.grad.tolist()
    assert cosine_B.grad is not None
    everything = zip(
        COSINES,
        NORMS,
        situations(case, margin, seen, cosine_B, norm_B.tolist()),
        t_B.tolist(),
        cosine_B.grad.tolist(),
        norm_slopes,
        strict=True,
    )
    for c, norm, now, t, cosine_slope, norm_slope in everything:
        assert t == pytest.approx(scale * formula(c, norm, now), rel=1e-9, abs=1e-9)
        # The step leaves 4e-9 of truncation where 1 - |c| is 1e-5; the rest is cancellation.
        expected = slope_of(lambda x: scale * formula(x, norm, now), c, 1e-7 * (1 - c * c + 1e-3))  # noqa: B023
        assert cosine_slope == pytest.approx(expected, rel=2e-5, abs=1e-4)
        expected = slope_of(lambda x: scale * formula(c, x, now), norm, 1e-4) if name == "magface" else 0.0  # noqa: B023
        assert norm_slope == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert any(norm_slopes) == (name == "magface")


@each_case
def test_target_and_others_may_be_called_twice_in_a_step(case: str) -> None:
    margin = built(case)
    walk(margin)
    cosine_B, norm_B = batch()
    first_B, second_B = margin.target(cosine_B, norm_B), margin.target(cosine_B, norm_B)
    assert torch.equal(first_B, second_B)
    z_TB = torch.linspace(-SCALE, SCALE, 9, dtype=torch.float64)[:, None].expand(9, 14)
    assert torch.equal(margin.others(z_TB, cosine_B)[0], margin.others(z_TB, cosine_B)[0])


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_hard_negatives_of_curricularface_are_weighted_by_the_running_mean(shape: tuple[int, ...]) -> None:
    margin = build_margin("curricularface", SCALE, SEED)
    t = 0.0
    for seen_B, _, _ in walk(margin):
        t = 0.01 * seen_B.mean().item() + 0.99 * t
    cosine_B = tensor([-0.999, -0.3, 0.2, 0.6, 0.95])
    t = 0.01 * cosine_B.mean().item() + 0.99 * t  # of this step's batch already, as in the authors' code
    torch.manual_seed(0)
    z_TB = SCALE * (2 * torch.rand(*shape, 5, dtype=torch.float64) - 1)
    z_TB[..., 0] = -0.95 * SCALE  # between t and the threshold where theta_y + m > pi: not hard
    z_TB.requires_grad_()
    out_TB, slope_TB = margin.others(z_TB, cosine_B)
    out_TB.sum().backward()
    assert slope_TB is not None
    assert z_TB.grad is not None
    assert out_TB.shape == slope_TB.shape == z_TB.shape
    num_hard = 0
    flat = [x_TB.detach().reshape(-1, 5).tolist() for x_TB in (z_TB, out_TB, slope_TB, z_TB.grad)]
    for rows in zip(*flat, strict=True):
        for c_y, z, out, slope, gradient in zip(cosine_B.tolist(), *rows, strict=True):
            c = z / SCALE
            is_hard = c > math.cos(math.acos(c_y) + 0.5)
            num_hard += is_hard
            assert out == pytest.approx(SCALE * c * (t + c) if is_hard else z, rel=1e-12)
            assert slope == pytest.approx(t + 2 * c if is_hard else 1.0, rel=1e-12)
            assert gradient == pytest.approx(slope, rel=1e-12)
    assert 0 < num_hard < z_TB.numel()


@each_name
def test_only_curricularface_looks_at_other_classes(name: str) -> None:
    margin = build_margin(name, SCALE, SEED)
    z_TB = torch.linspace(-SCALE, SCALE, 14, dtype=torch.float64)
    out_TB, slope_TB = margin.others(z_TB, batch()[0])
    assert margin.needs_target_first == (name == "curricularface")
    assert (slope_TB is None) == torch.equal(out_TB, z_TB) == (name != "curricularface")


@each_name
def test_only_magface_adds_a_penalty_and_it_is_convex_in_the_length(name: str) -> None:
    norm_B = batch()[1]
    penalty_B = build_margin(name, SCALE, SEED).penalty(norm_B)
    if name != "magface":
        assert penalty_B is None
        return
    assert penalty_B is not None
    penalty_B.sum().backward()
    assert norm_B.grad is not None
    for norm, penalty, slope in zip(NORMS, penalty_B.tolist(), norm_B.grad.tolist(), strict=True):
        a = min(max(norm, 10.0), 110.0)
        assert penalty == pytest.approx(35 * (a / 110**2 + 1 / a), rel=1e-12)
        assert slope == pytest.approx(35 * (1 / 110**2 - 1 / a**2) if a == norm else 0.0, rel=1e-9, abs=1e-12)


@each_case
def test_target_logit_never_falls_as_the_cosine_rises(case: str) -> None:
    """But for MagFace, which falls by sin(m) at 90 degrees, where its margin begins."""
    margin = built(case)
    for low, high in ((-1.0, 0.0), (1e-9, 1.0)) if CASES[case][0] == "magface" else ((-1.0, 1.0),):
        cosine_T = torch.linspace(low, high, 2001, dtype=torch.float64)
        for norm in (0.1, 20.0, 60.0, 200.0):
            norm_T = torch.full_like(cosine_T, norm)
            if isinstance(margin, ElasticArcFace | ElasticCosFace):  # a batch of one image has one margin
                images = zip(cosine_T[::20].split(1), norm_T[::20].split(1), strict=True)
                t_T = torch.cat([margin.target(c, n) for c, n in images])
            else:
                t_T = margin.target(cosine_T, norm_T)
            assert t_T.diff().min() >= -1e-12
            assert t_T[-1] - t_T[0] > 0.5 * SCALE


@each_case
def test_no_logit_of_another_class_is_higher_than_the_highest(case: str) -> None:
    margin = built(case)
    cosine_T = torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    for _ in range(300):  # t of CurricularFace is then 0.95
        ones_B = torch.ones(5, dtype=torch.float64)
        margin.observe(ones_B, 50 * ones_B, 5 * ones_B)
    out_T, _ = margin.others(margin.scale * cosine_T, -torch.ones_like(cosine_T))
    highest = out_T.abs().max().item()
    assert 0.9 * margin.highest_logit() < highest <= margin.highest_logit() * (1 + 1e-12)


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_bounded_where_that_of_acos_is_not(name: str, dtype: torch.dtype) -> None:
    margin = build_margin(name, SCALE, SEED)
    beyond = 1 + 2e-7  # as a product of unit vectors in float32 may be
    cosine_B = torch.tensor(
        [-beyond, -1.0, -1 + 1e-7, 1 - 1e-7, 1.0, beyond], dtype=dtype, requires_grad=True
    )
    norm_B = torch.full((6,), 50.0, dtype=dtype, requires_grad=True)
    t_B = margin.target(cosine_B, norm_B)
    out_B, slope_B = margin.others(SCALE * cosine_B, cosine_B)
    (t_B.sum() + out_B.sum()).backward()
    assert t_B.dtype == out_B.dtype == dtype
    assert cosine_B.grad is not None
    assert cosine_B.grad.abs().max() < 1000 * SCALE
    assert norm_B.grad is None or norm_B.grad.isfinite().all()
    assert slope_B is None or (slope_B.isfinite().all() and slope_B.dtype == dtype)


@each_case
def test_float32_gives_what_float64_gives(case: str) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        margin = built(case)
        cosine_B, norm_B = (x_B.detach().to(dtype).requires_grad_() for x_B in batch())
        t_B = margin.target(cosine_B, norm_B)
        t_B.sum().backward()
        assert t_B.dtype == dtype
        assert cosine_B.grad is not None
        results.append((t_B.detach().double(), cosine_B.grad.double()))
    (t_B, gradient_B), (single_t_B, single_gradient_B) = results
    torch.testing.assert_close(single_t_B, t_B, rtol=1e-5, atol=1e-4)
    # 1 - c^2 is 2e-5 at the ends of the grid and known to 1.2e-7 in float32: 0.6 %, half of it in the slope.
    torch.testing.assert_close(single_gradient_B, gradient_B, rtol=5e-3, atol=1e-3)


def test_near_the_centroid_the_margin_still_counts() -> None:
    margin = build_margin("arcface", SCALE, SEED)
    one_B = torch.ones(1, dtype=torch.float64)
    # 0.001 rad short of the true angle.
    assert margin.target(one_B, one_B).item() == pytest.approx(SCALE * math.cos(0.5), abs=1e-3 * SCALE)


def test_running_mean_of_curricularface_follows_the_target_cosine() -> None:
    margin = build_margin("curricularface", SCALE, SEED)
    assert margin.state_dict()["t"].item() == 0.0
    t = 0.0
    for cosine_B, _, _ in walk(margin, 3):
        t = 0.99 * t + 0.01 * sum(cosine_B.tolist()) / 5
    assert margin.state_dict()["t"].item() == pytest.approx(t, rel=1e-12)


def test_running_statistics_of_adaface_follow_the_lengths() -> None:
    margin = build_margin("adaface", SCALE, SEED, momentum=0.1)
    mean, deviation = 20.0, 100.0
    for _, norm_B, _ in walk(margin, 3):
        new_mean, new_deviation = statistics(norm_B.tolist())
        mean, deviation = 0.9 * mean + 0.1 * new_mean, 0.9 * deviation + 0.1 * new_deviation
    state = margin.state_dict()
    assert state["norm_mean"].item() == pytest.approx(mean, rel=1e-12)
    assert state["norm_deviation"].item() == pytest.approx(deviation, rel=1e-12)


def test_adaface_takes_a_batch_of_one_image() -> None:
    margin = build_margin("adaface", SCALE, SEED)
    cosine_B, norm_B = batch(1)
    margin.observe(cosine_B, norm_B, cosine_B)
    assert margin.target(cosine_B, norm_B).isfinite().all()


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("wide", [False, True])
def test_scale_of_adacos_follows_the_batch(size: int, wide: bool) -> None:
    margin = build_margin("adacos", 6.0, SEED)
    torch.manual_seed(0)
    others_BK = torch.rand(size, 20, dtype=torch.float64) - 0.5
    cosine_B = 0.75 + 0.2 * torch.rand(size, dtype=torch.float64) - (0.8 if wide else 0.0)
    s = 6.0
    for _ in range(3):
        margin.observe(cosine_B, cosine_B, torch.logsumexp(margin.scale * others_BK, 1))
        mean = sum(math.exp(s * c) for row in others_BK.tolist() for c in row) / size
        median = sorted(math.acos(c) for c in cosine_B.tolist())[(size - 1) // 2]
        assert (median > math.pi / 4) == wide
        s = math.log(mean) / math.cos(min(math.pi / 4, median))
        assert margin.scale == pytest.approx(s, rel=1e-12)
        assert margin.highest_logit() == margin.scale
        assert margin.target(cosine_B, cosine_B)[0].item() == pytest.approx(s * cosine_B[0].item(), rel=1e-12)


def test_scale_of_adacos_is_at_least_one_and_says_when_it_runs_away() -> None:
    margin = build_margin("adacos", 6.0, SEED)
    cosine_B = torch.zeros(3)
    margin.observe(cosine_B, cosine_B, torch.full((3,), -6.0))  # two classes, opposite centroids
    assert margin.scale == 1.0
    margin.observe(cosine_B, cosine_B, torch.full((3,), 800.0))
    with pytest.raises(UserError, match=r"loss\.name is adacos and its scale has run away to 1\.13e\+03"):
        _ = margin.scale


def test_margin_of_sphereface_comes_in_as_lambda_falls() -> None:
    margin = build_margin("sphereface", SCALE, SEED)
    one_B = tensor([0.5])
    for step in range(0, 3000, 500):
        weight = max(5.0, 1000 / (1 + 0.12 * step))
        expected = SCALE * annealed(0.5, 4, weight)
        assert margin.target(one_B, one_B).item() == pytest.approx(expected, rel=1e-12)
        walk(margin, 500)


def drawn(seed: int, step: int, size: int = 32, **numbers: float) -> Tensor:
    """Return the margins of a batch whose cosines are 0: 0 - t / s."""
    margin = build_margin("elasticface_cos", SCALE, seed, **numbers)
    walk(margin, step)
    zero_B = torch.zeros(size, dtype=torch.float64)
    return -margin.target(zero_B, zero_B) / SCALE


def test_random_margins_are_normal_and_new_in_every_step() -> None:
    margin = build_margin("elasticface_cos", SCALE, SEED, margin=0.4, sigma=0.1)
    zero_B = torch.zeros(8, dtype=torch.float64)
    rows = []
    for _ in range(1000):
        rows.append((-margin.target(zero_B, zero_B) / SCALE - 0.4) / 0.1)
        margin.observe(zero_B, zero_B, zero_B)
    normal_TB = torch.stack(rows)
    # 8000 numbers: 4.5 standard errors each.
    assert abs(normal_TB.mean().item()) < 0.05
    assert abs(normal_TB.std().item() - 1.0) < 0.036
    assert abs((normal_TB.abs() < 1).double().mean().item() - 0.6827) < 0.024
    assert abs((normal_TB[1:] * normal_TB[:-1]).mean().item()) < 0.05  # of one position in steps that follow
    assert abs((normal_TB[:, 1:] * normal_TB[:, :-1]).mean().item()) < 0.054
    assert normal_TB.unique().numel() == 8000


def test_random_margins_are_those_of_the_paper_by_default() -> None:
    zero_B = torch.zeros(4)
    for name, margin in (("elasticface_arc", 0.5), ("elasticface_cos", 0.35)):
        default, explicit = (
            build_margin(name, SCALE, SEED, **numbers)
            for numbers in ({}, {"margin": margin, "sigma": 0.05, "plus": 0})
        )
        assert torch.equal(default.target(zero_B, zero_B), explicit.target(zero_B, zero_B))


def test_random_margins_depend_on_seed_and_step_and_nothing_else() -> None:
    assert torch.equal(drawn(1, 4), drawn(1, 4))
    torch.manual_seed(99)
    assert torch.equal(drawn(1, 4), drawn(1, 4))
    batches = [drawn(seed, step) for seed in (0, 1, 2**32 - 1) for step in (0, 1, 2)]
    assert len({tuple(margin_B.tolist()) for margin_B in batches}) == 9
    state = torch.random.get_rng_state()
    drawn(1, 4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_plus_gives_the_smallest_cosine_the_largest_margin() -> None:
    cosine_B = tensor(
        [0.9, 0.1, 0.5, 0.3, -0.2]
    )  # in descending order a permutation that is not its own inverse
    margins = []
    for plus in (0, 1):
        margin = build_margin("elasticface_cos", SCALE, SEED, plus=plus)
        margins.append((cosine_B - margin.target(cosine_B, cosine_B) / SCALE).tolist())
    plain, plus_margins = margins
    assert sorted(plus_margins) == pytest.approx(sorted(plain), rel=1e-12)
    by_cosine = [m for _, m in sorted(zip(cosine_B.tolist(), plus_margins, strict=True))]
    assert by_cosine == sorted(by_cosine, reverse=True)
    assert plain != pytest.approx(plus_margins)


@each_case
def test_a_saved_state_goes_on_with_the_same_numbers(case: str) -> None:
    margin, resumed, fresh = built(case), built(case), built(case)
    for cosine_B, _, log_sum_B in walk(margin):
        margin.learn(cosine_B, log_sum_B, -cosine_B)
    file = io.BytesIO()
    torch.save(margin.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    z_TB = torch.linspace(-SCALE, SCALE, 14, dtype=torch.float64)
    for _ in range(2):
        assert resumed.scale == margin.scale
        numbers = [
            torch.stack([m.target(*batch()), m.others(z_TB, batch()[0])[0]]) for m in (margin, resumed, fresh)
        ]
        assert torch.equal(numbers[0], numbers[1])
        # Without lambda, and with a momentum of 1, the state has nothing to say; UniFace's, only to the head.
        matters = len(margin.state_dict()) > 0 and case not in (
            "sphereface without lambda",
            "adaface, all qualities",
            "uniface",
        )
        assert torch.equal(numbers[0], numbers[2]) != matters
        walk(margin, 1)
        walk(resumed, 1)


@each_name
def test_observing_touches_neither_gradients_nor_the_graph_of_the_step(name: str) -> None:
    margin = build_margin(name, SCALE, SEED)
    gradients = []
    for observe_before_backward in (False, True):
        cosine_B, norm_B = batch()
        z_TB = torch.linspace(-SCALE, SCALE, 14, dtype=torch.float64).requires_grad_()
        total = margin.target(cosine_B, norm_B).sum() + margin.others(z_TB, cosine_B)[0].sum()
        if observe_before_backward:
            margin.observe(cosine_B, norm_B, cosine_B)
            assert not any(buffer.requires_grad for buffer in margin.buffers())
        total.backward()
        gradients.append((cosine_B.grad, z_TB.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert not list(margin.parameters())


def longhand_loss(
    case: str, c: list[list[float]], now: list[Situation], norms: list[float], labels: list[int], seen: list
) -> float:
    """Return the mean loss of B x K cosines in the first step; CurricularFace takes ``seen`` as given."""
    name, _, formula = CASES[case]
    t = 0.01 * sum(seen) / len(seen)
    total = 0.0
    for row, situation, norm, y, c_y in zip(c, now, norms, labels, seen, strict=True):
        target = SCALE * formula(row[y], norm, situation)
        others = [row[j] for j in range(len(row)) if j != y]
        if name == "curricularface":
            hard = math.cos(math.acos(c_y) + 0.5)
            others = [c_j * (t + c_j) if c_j > hard else c_j for c_j in others]
        total += math.log(math.exp(target) + sum(math.exp(SCALE * c_j) for c_j in others)) - target
        if name == "magface":
            a = min(max(norm, 10.0), 110.0)
            total += 35 * (a / 110**2 + 1 / a)
    return total / len(c)


@each_case
def test_loss_of_a_batch_and_its_gradients_are_those_of_the_formula(case: str) -> None:
    torch.manual_seed(1)
    cosine_BK = (1.8 * torch.rand(5, 7, dtype=torch.float64) - 0.9).requires_grad_()
    norm_B = tensor([5.0, 20.0, 35.0, 80.0, 120.0]).requires_grad_()
    labels = [3, 0, 6, 3, 1]
    margin = built(case)

    rows_B, labels_B = torch.arange(5), torch.tensor(labels)
    target_cosine_B = cosine_BK[rows_B, labels_B]
    t_B = margin.target(target_cosine_B, norm_B)
    out_KB, slope_KB = margin.others(SCALE * cosine_BK.T, target_cosine_B)
    out_KB = out_KB.index_put((labels_B, rows_B), tensor([-math.inf]))
    log_sum_B = torch.logaddexp(t_B, out_KB.logsumexp(0))
    penalty_B = margin.penalty(norm_B)
    loss = (log_sum_B - t_B + (0.0 if penalty_B is None else penalty_B)).mean()
    loss.backward()
    assert cosine_BK.grad is not None

    c, norms, seen = cosine_BK.tolist(), norm_B.tolist(), target_cosine_B.tolist()
    now = situations(case, margin, [], target_cosine_B, norms)
    assert loss.item() == pytest.approx(longhand_loss(case, c, now, norms, labels, seen), rel=1e-11)

    def loss_moved(change: float) -> float:
        moved = [[c[b][j] + change * ((b, j) == (i, k)) for j in range(7)] for b in range(5)]
        return longhand_loss(case, moved, now, norms, labels, seen)

    for i in range(5):
        for k in range(7):
            expected = slope_of(loss_moved, 0.0, 1e-6)
            assert cosine_BK.grad[i, k].item() == pytest.approx(expected, rel=1e-6, abs=1e-8)

    # The way of the head: no autograd through the logits of other classes, but their slope.
    probability_KB = torch.exp(out_KB - log_sum_B).detach() / 5
    gradient_BK = (SCALE * probability_KB * (1.0 if slope_KB is None else slope_KB)).T
    is_other_BK = torch.ones(5, 7, dtype=torch.bool).index_put((rows_B, labels_B), torch.tensor(False))
    torch.testing.assert_close(gradient_BK[is_other_BK], cosine_BK.grad[is_other_BK])


@each_name
def test_every_loss_is_built_by_its_name_with_the_scale_given(name: str) -> None:
    margin = build_margin(name, 30.0, 5)
    assert type(margin) is MARGINS[name]
    assert isinstance(margin, CosineSoftmax)
    assert margin.scale == 30.0


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("coco", {"margin": 0.5}, "loss.margins.margin = 0.5: coco takes no numbers"),
        ("cosface", {"h": 0.3}, "loss.margins.h = 0.3: cosface takes margin"),
        ("adacos", {"scale": 3.0}, "loss.margins.scale = 3.0: adacos takes no numbers"),
        (
            "elasticface_cos",
            {"seed": 1},
            "loss.margins.seed = 1: elasticface_cos takes margin, sigma, plus",
        ),
        ("arcface", {"margin": 28.6}, "loss.margins.margin must be a number in 0..1.5708, got 28.6"),
        ("arcface", {"margin": -0.1}, "loss.margins.margin must be a number in 0..1.5708, got -0.1"),
        ("cosface", {"margin": math.nan}, "loss.margins.margin must be a number in 0..2, got nan"),
        (
            "sphereface",
            {"lambda_start": math.inf},
            "loss.margins.lambda_start must be a number in 0..inf, got inf",
        ),
        ("magface", {"norm_high": 10.0}, "loss.margins.norm_high must be a number in 10.001..inf, got 10.0"),
        ("adaface", {"momentum": 2.0}, "loss.margins.momentum must be a number in 0..1, got 2.0"),
        ("uniface", {"weight": 0.0}, "loss.margins.weight must be a number in 1e-06..inf, got 0.0"),
        ("elasticface_arc", {"plus": 0.5}, "loss.margins.plus must be true or false, got 0.5"),
    ],
)
def test_a_number_that_the_loss_does_not_take_is_refused(name: str, numbers: Numbers, message: str) -> None:
    with pytest.raises(UserError) as refused:
        build_margin(name, SCALE, SEED, **numbers)
    assert str(refused.value) == message


def test_a_loss_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^loss\.name must be one of coco, normface, .*, uniface; got 'cosin'$"
    ):
        build_margin("cosin", SCALE, SEED)
