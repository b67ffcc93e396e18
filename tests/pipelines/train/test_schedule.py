"""The learning-rate factor against its closed form."""

import math

import pytest

from pipelines.train.schedule import lr_factor


def test_it_rises_in_equal_steps_then_falls_as_half_a_cosine() -> None:
    factors = [lr_factor(step, 1000, 10) for step in range(1001)]
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * step / 1000)) / 2 for step in range(1001)]
    for step in range(9):
        assert factors[step] == pytest.approx((step + 1) / 10 * cosine[step], rel=1e-12)
    assert factors[9:] == pytest.approx(cosine[9:], rel=1e-12)
    assert factors[500] == pytest.approx(0.505)
    assert max(factors) == factors[9]


@pytest.mark.parametrize("step", [100, 101, 10_000])
def test_it_ends_at_the_floor_and_stays_there(step: int) -> None:
    assert lr_factor(step, 100, 10, floor=0.2) == pytest.approx(0.2)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert lr_factor(0, 10, 0) == lr_factor(0, 10, 1) == 1.0


def test_the_first_step_of_a_warm_up_is_not_lost() -> None:
    assert lr_factor(0, 10_000, 200) == pytest.approx(1 / 200)
