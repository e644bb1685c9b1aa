"""The learning rate by step, against values worked out by hand."""

import math

import pytest

from trainer.schedule import lr_at

PLAN = {"peak": 0.8, "total_steps": 11, "warmup_steps": 0, "final_fraction": 0.0}


def curve(**changes: object) -> list[float]:
    plan = {**PLAN, **changes}
    return [lr_at(step, **plan) for step in range(plan["total_steps"])]


def test_linear_falls_from_the_peak_to_the_final_rate_in_equal_parts() -> None:
    assert curve(shape="linear") == pytest.approx([0.8 - 0.08 * step for step in range(11)])
    assert curve(shape="linear", final_fraction=0.25) == pytest.approx(
        [0.8 - 0.06 * step for step in range(11)]
    )


def test_cosine_is_half_a_period() -> None:
    rates = curve(shape="cosine")
    assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 10)) for step in range(11)])
    assert rates[0] == 0.8
    assert rates[5] == pytest.approx(0.4)
    assert rates[10] == pytest.approx(0.0, abs=1e-15)
    assert curve(shape="cosine", final_fraction=0.1)[10] == pytest.approx(0.08)


def test_constant_stays_at_the_peak() -> None:
    assert curve(shape="constant", final_fraction=0.5) == [0.8] * 11


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_warmup_rises_in_equal_parts_and_the_peak_is_reached_once_warm(shape: str) -> None:
    rates = curve(shape=shape, warmup_steps=4, final_fraction=0.5)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[-1] == pytest.approx(0.8 if shape == "constant" else 0.4)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_a_plan_of_one_step_or_of_warmup_only_is_finite_and_positive(shape: str) -> None:
    assert curve(shape=shape, total_steps=1) == [0.8]
    assert curve(shape=shape, total_steps=3, warmup_steps=3) == pytest.approx([0.8 / 3, 1.6 / 3, 0.8])
    assert curve(shape=shape, total_steps=3, warmup_steps=2) == pytest.approx([0.4, 0.8, 0.8])
