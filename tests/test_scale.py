"""The scale rules against the table of the analysis (docs/coco.md) and against a numeric minimum.

Legend: K classes, D dimensions.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.scale import (
    PAPER_LOSS,
    adacos_scale,
    paper_scale,
    scale_of,
    simplex_loss,
    simplex_scale,
)

# K, paper rule, lowest loss at the paper's alpha (simplex), simplex rule, sqrt(2) log(K-1)
TABLE = [
    (2, 3.000, 0.0025, 3.000, 0.0),
    (10, 4.0986, 0.0905, 7.378, 3.107),
    (100, 5.2976, 0.3850, 10.489, 6.498),
    (1000, 6.4534, 0.9414, 12.894, 9.768),
    (1409, 6.6250, 1.0506, 13.241, 10.253),
    (10575, 7.6331, 1.8109, 15.265, 13.104),
    (85742, 8.6795, 2.7458, 17.359, 16.064),
    (1_000_000, 9.9078, 3.9276, 19.815, 19.538),
]


@pytest.mark.parametrize(("num_classes", "paper", "loss_at_paper", "simplex", "adacos"), TABLE)
def test_rules_give_the_table(
    num_classes: int, paper: float, loss_at_paper: float, simplex: float, adacos: float
) -> None:
    assert paper_scale(num_classes) == pytest.approx(paper, abs=6e-5)
    assert simplex_scale(num_classes) == pytest.approx(simplex, abs=6e-4)
    assert adacos_scale(num_classes) == pytest.approx(max(1.0, adacos), abs=6e-4)
    assert simplex_loss(num_classes, paper_scale(num_classes)) == pytest.approx(loss_at_paper, abs=6e-5)


@pytest.mark.parametrize("num_classes", [row[0] for row in TABLE])
def test_simplex_rule_reaches_the_loss_that_the_paper_aims_at(num_classes: int) -> None:
    assert pytest.approx(0.0024757, abs=1e-7) == PAPER_LOSS
    assert simplex_loss(num_classes, simplex_scale(num_classes)) == pytest.approx(PAPER_LOSS, rel=1e-9)
    assert simplex_loss(num_classes, simplex_scale(num_classes, 0.1)) == pytest.approx(0.1, rel=1e-9)


def test_paper_and_simplex_rule_are_equal_for_two_classes_only() -> None:
    assert simplex_scale(2) == pytest.approx(paper_scale(2), rel=1e-12)
    assert all(simplex_scale(k) > paper_scale(k) + 0.5 for k in (3, 10, 1000))


def test_lowest_loss_falls_as_the_scale_grows() -> None:
    losses = [simplex_loss(10, scale) for scale in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(10))


def test_a_number_is_its_own_scale_and_a_name_is_its_rule() -> None:
    assert scale_of(64, 10) == 64.0
    assert isinstance(scale_of(64, 10), float)
    assert scale_of("paper", 10) == paper_scale(10)
    assert scale_of("simplex", 10) == simplex_scale(10)
    assert scale_of("adacos", 10) == adacos_scale(10)


def numeric_minimum(num_classes: int, dim: int, scale: float) -> float:
    """Minimise the loss over free features (one for each class) and centroids in float64."""
    torch.manual_seed(0)
    features_KD = torch.randn(num_classes, dim, dtype=torch.float64, requires_grad=True)
    centroids_KD = torch.randn(num_classes, dim, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [features_KD, centroids_KD], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss_of() -> torch.Tensor:
        optimizer.zero_grad()
        z_KK = scale * F.normalize(features_KD) @ F.normalize(centroids_KD).T
        loss = F.cross_entropy(z_KK, torch.arange(num_classes))
        loss.backward()
        return loss

    optimizer.step(loss_of)
    return float(loss_of().detach())


@pytest.mark.parametrize("rule", ["paper", "simplex", "adacos"])
def test_simplex_loss_is_the_numeric_minimum_where_the_simplex_fits(rule: str) -> None:
    scale = scale_of(rule, 10)
    assert numeric_minimum(10, 9, scale) == pytest.approx(simplex_loss(10, scale), rel=1e-6)


def test_in_two_dimensions_the_minimum_is_that_of_the_circle_and_higher() -> None:
    scale = 2.0
    circle = math.log(sum(math.exp(scale * (math.cos(2 * math.pi * j / 10) - 1)) for j in range(10)))
    minimum = numeric_minimum(10, 2, scale)
    assert minimum == pytest.approx(circle, rel=1e-6)
    assert minimum == pytest.approx(1.126579, abs=1e-6)
    assert minimum > simplex_loss(10, scale) + 0.4
