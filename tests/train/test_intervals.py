"""Intervals that redraw whole patients, for means, ratios and curves."""

from __future__ import annotations

import numpy as np
import pytest

from cclip_deploy.train.intervals import Estimate, PatientBootstrap, divide

RNG = np.random.default_rng(3)


def test_a_mean_has_the_interval_that_redrawing_rows_one_by_one_gives() -> None:
    values = RNG.random(40)
    patients = [f"p{row // 2}" for row in range(40)]
    found = PatientBootstrap(patients, seed=5).mean(values)
    names, owner = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng(5).integers(0, len(names), (2000, len(names)))
    means = [np.mean(np.concatenate([values[owner == patient] for patient in draw])) for draw in draws]
    low, high = np.percentile(means, (2.5, 97.5))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert (found.rows, found.patients) == (40, 20)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = RNG.normal(size=400)
    found = PatientBootstrap([str(row) for row in range(400)]).mean(values)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_rows_of_one_patient_do_not_narrow_the_interval() -> None:
    values = RNG.random(20)
    alone = PatientBootstrap([str(row) for row in range(20)]).mean(values)
    repeated = PatientBootstrap([str(row) for row in range(20)] * 50).mean(np.tile(values, 50))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    parts = np.array([[1.0, 2.0], [30.0, 40.0]])
    found = PatientBootstrap(["a", "b"]).estimate(parts, divide)[0]
    assert found.value == pytest.approx(31 / 42)
    assert (found.low, found.high) == pytest.approx((0.5, 0.75))


def test_one_patient_has_a_value_and_no_interval() -> None:
    found = PatientBootstrap(["a", "a"]).mean([0.2, 0.4])
    assert found == Estimate(pytest.approx(0.3), None, None, 2, 1)
    assert found.show() == "0.300"


def test_a_mean_of_no_rows_is_not_defined() -> None:
    found = PatientBootstrap(["a", "b"]).mean([None, None])
    assert found == Estimate(None, None, None, 0, 0)
    assert found.show() == "–"


def test_unknown_values_take_no_part() -> None:
    found = PatientBootstrap(["a", "b", "c"]).mean([0.5, None, 0.7])
    assert found.value == pytest.approx(0.6)
    assert (found.rows, found.patients) == (2, 2)
    assert found.show(2) == "0.60 [0.50, 0.70]"
