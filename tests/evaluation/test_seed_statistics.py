"""Statistics over seeds against closed forms, scipy and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from cclip_deploy.evaluation.seed_statistics import (
    detectable_difference,
    holm,
    paired_difference,
    power_of_paired_test,
    seed_statistics,
    student_p_value,
)


def test_three_values_have_students_interval() -> None:
    spread = seed_statistics([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # t(0.975, 2), from a table
    assert (spread.mean, spread.sd) == (2.0, 1.0)
    assert (spread.low, spread.high) == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))
    assert spread.show(2) == "2.00 [-0.48, 4.48]"


def test_one_value_has_no_interval() -> None:
    spread = seed_statistics([0.25])
    assert (spread.sd, spread.low, spread.high, spread.show(signed=True)) == (None, None, None, "+0.250")


def test_equal_differences_have_zero_standard_deviation() -> None:
    difference = paired_difference([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert difference.mean == pytest.approx(0.1)
    assert difference.sd == pytest.approx(0, abs=1e-12)


def test_unequal_numbers_of_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


def test_p_values_match_scipy() -> None:
    values, other = [0.51, 0.62, 0.58, 0.71, 0.66], [0.44, 0.57, 0.60, 0.61, 0.63]
    found = student_p_value(paired_difference(values, other))
    assert found == pytest.approx(ttest_rel(values, other).pvalue, rel=1e-9)
    assert student_p_value(seed_statistics([0.5, 0.5])) == 0
    assert student_p_value(seed_statistics([0.0, 0.0])) == 1


def test_holm_correction_is_monotonic() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("difference", "sd", "pairs"), [(0.15, 0.126, 5), (0.15, 0.104, 5), (0.1, 0.2, 12), (1, 1, 2)])
def test_power_matches_a_simulation(difference: float, sd: float, pairs: int) -> None:
    drawn = np.random.default_rng(0).normal(difference, sd, (pairs, 100_000))
    found = ttest_rel(drawn, np.zeros_like(drawn)).pvalue < 0.05
    assert power_of_paired_test(difference, sd, pairs) == pytest.approx(found.mean(), abs=0.006)
    assert power_of_paired_test(-difference, sd, pairs) == power_of_paired_test(difference, sd, pairs)


def test_power_without_difference_or_variance() -> None:
    assert power_of_paired_test(0, 0.1, 5) == pytest.approx(0.05)
    assert power_of_paired_test(0.1, 0, 5) == 1


@pytest.mark.parametrize("pairs", [2, 3, 5, 100])
def test_the_detectable_difference_has_a_power_of_80_percent(pairs: int) -> None:
    assert power_of_paired_test(detectable_difference(0.3, pairs), 0.3, pairs) == pytest.approx(0.8, abs=1e-6)
    assert detectable_difference(0, pairs) == 0
