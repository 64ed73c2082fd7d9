"""Spreads over seeds, against closed forms."""

from __future__ import annotations

import pytest

from cclip_deploy.train.spread import paired_difference, spread_of


def test_three_values_have_students_interval_of_two_degrees_of_freedom() -> None:
    spread = spread_of([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # t(0.975, 2), from a table
    assert (spread.mean, spread.sd) == (2.0, 1.0)
    assert (spread.low, spread.high) == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))
    assert spread.show(2) == "2.00 [-0.48, 4.48]"


def test_one_value_has_no_interval() -> None:
    spread = spread_of([0.25])
    assert (spread.sd, spread.low, spread.high, spread.show(signed=True)) == (None, None, None, "+0.250")


def test_pairs_that_differ_by_the_same_have_no_spread_however_far_they_lie_apart() -> None:
    difference = paired_difference([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert difference.mean == pytest.approx(0.1)
    assert difference.sd == pytest.approx(0, abs=1e-12)


def test_unequal_numbers_of_seeds_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])
