"""Ranges: exact for min-max, independent of the images' order, and clipped as percentile and entropy define."""

from __future__ import annotations

import numpy as np
import pytest

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.ranges import BINS, TensorStatistics, ranges_of


def counted(*batches: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.add(batch.astype(np.float32))
    return statistics


def range_of(values: np.ndarray, method: str, percentile: float = 99.99) -> float:
    return ranges_of({"x": counted(values)}, method, percentile)["x"]  # type: ignore[arg-type]


def test_min_max_is_the_largest_absolute_value() -> None:
    assert range_of(np.array([-3.5, 0.25, 2]), "min-max") == 3.5


def test_a_histogram_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, scale, 1000) for scale in (0.001, 1, 30)]
    forward, backward = counted(*batches), counted(*batches[::-1])
    np.testing.assert_array_equal(forward.counts, backward.counts)
    assert (forward.span, forward.largest) == (backward.span, backward.largest)
    assert forward.counts.sum() == 3000


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_is_numpys_within_a_bin(percentile: float) -> None:
    values = np.random.default_rng(1).normal(0, 2, 50_000)
    exact = np.quantile(np.abs(values), percentile / 100)
    assert abs(range_of(values, "percentile", percentile) - exact) <= 3 * 16 / BINS


def test_percentile_100_is_min_max() -> None:
    values = np.random.default_rng(2).normal(0, 2, 1000)
    assert range_of(values, "percentile", 100) == np.float32(np.abs(values).max())


def test_entropy_clips_an_outlier_but_not_a_uniform_distribution() -> None:
    rng = np.random.default_rng(3)
    assert range_of(np.append(rng.normal(0, 1, 100_000), 60.0), "entropy") < 8
    assert range_of(rng.uniform(-1, 1, 100_000), "entropy") > 0.9


def test_zeros_of_a_relu_do_not_hide_the_rest() -> None:
    values = np.append(np.zeros(1_000_000), np.abs(np.random.default_rng(4).normal(0, 1, 10_000)))
    assert 2 < range_of(values, "entropy") <= values.max() * 1.0001


@pytest.mark.parametrize("method", ["min-max", "entropy", "percentile"])
def test_a_tensor_that_is_always_zero_has_range_zero(method: str) -> None:
    assert range_of(np.zeros(10), method) == 0


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ParityError):
            counted(np.array([1.0, bad]))


def test_invalid_options_are_refused() -> None:
    with pytest.raises(UsageError, match="no calibration method 'median'"):
        ranges_of({}, "median")  # type: ignore[arg-type]
    for percentile in (0.0, 50.0, 101.0):
        with pytest.raises(UsageError, match="must be above 50"):
            ranges_of({}, "percentile", percentile)
