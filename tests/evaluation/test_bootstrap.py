"""Tests of the studentized bootstrap over patients."""

from __future__ import annotations

import numpy as np
import pytest

from cclip_deploy.evaluation.bootstrap import (
    DIFFERENCE_OF_FRACTIONS,
    FEW_PATIENTS,
    FRACTION,
    NONNEGATIVE,
    RESAMPLES,
    UNBOUNDED,
    Estimate,
    Floats,
    PatientBootstrap,
    Range,
    divide,
    student_quantile,
)

RNG = np.random.default_rng(3)


def names(count: int) -> list[str]:
    return [str(patient) for patient in range(count)]


def ratio_of_halves(sums: Floats) -> Floats:
    above, below = np.split(sums, 2, axis=-1)
    return above / below


def slow_interval(above: Floats, below: Floats, seed: int) -> tuple[float, float]:
    """Compute the documented formula for one ratio with loops over resamples and left-out patients."""
    patients = len(above)

    def error(rows: list[int]) -> float:
        left_out = [np.delete(rows, place) for place in range(patients)]
        values = np.array([above[some].sum() / below[some].sum() for some in left_out])
        return float(np.sqrt((patients - 1) / patients * ((values - values.mean()) ** 2).sum()))

    value, of_all = above.sum() / below.sum(), error(list(range(patients)))
    drawn = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), RESAMPLES)
    found = []
    for counts in drawn:
        rows = np.repeat(np.arange(patients), counts)
        found.append((above[rows].sum() / below[rows].sum() - value) / error(list(rows)))
    student = student_quantile(patients - 1)
    ordered = np.sort(found)
    below_t = -np.clip(-ordered[round(0.025 * (RESAMPLES - 1))], student, 2 * student)
    above_t = np.clip(ordered[round(0.975 * (RESAMPLES - 1))], student, 2 * student)
    return float(value - above_t * of_all), float(value - below_t * of_all)


def test_the_interval_matches_the_documented_formula() -> None:
    above, below = RNG.random(7), 1 + RNG.random(7)
    found = PatientBootstrap(names(7), seed=5).estimate(np.stack([above, below], axis=1), divide, UNBOUNDED)[0]
    assert (found.low, found.high) == pytest.approx(slow_interval(above, below, 5))
    assert found.value == pytest.approx(above.sum() / below.sum())


def test_student_quantiles_match_a_table() -> None:
    assert [student_quantile(degrees) for degrees in (1, 4, 30)] == pytest.approx([12.7062, 2.77645, 2.04227], abs=1e-4)


@pytest.mark.parametrize("patients", [3, 5, 10, 20])
def test_intervals_of_few_patients_cover_the_true_value(patients: int) -> None:
    """400 data sets of skewed scores. The percentile bootstrap covers 69.8, 80.3, 87.3 and 89.5 % of them."""
    rng, sets = np.random.default_rng(patients), 400
    above = rng.beta(4, 1, (patients, sets)) * (rng.random((patients, sets)) > 0.05)
    truth = 4 / 5 * 0.95
    found = PatientBootstrap(names(patients)).estimate(
        np.concatenate([above, np.ones_like(above)], axis=1), ratio_of_halves, FRACTION
    )
    covered = np.mean([e.low is not None and e.high is not None and e.low <= truth <= e.high for e in found])
    assert 100 * covered >= 92.5


def test_the_interval_of_many_patients_has_the_normal_width() -> None:
    values = RNG.normal(size=400)
    found = PatientBootstrap(names(400)).mean(values, UNBOUNDED)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_rows_of_one_patient_do_not_narrow_the_interval() -> None:
    values = RNG.random(20)
    alone = PatientBootstrap(names(20)).mean(values, FRACTION)
    repeated = PatientBootstrap(names(20) * 50).mean(np.tile(values, 50), FRACTION)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_a_ratio_is_a_ratio_of_sums() -> None:
    parts = np.array([[1.0, 2.0], [30.0, 40.0]])
    found = PatientBootstrap(["a", "b"]).estimate(parts, divide, FRACTION)[0]
    assert found.value == pytest.approx(31 / 42)


def test_the_interval_is_determined_by_the_seed() -> None:
    values = RNG.random(30)
    one, same, other = (PatientBootstrap(names(30), seed).mean(values, FRACTION) for seed in (1, 1, 2))
    assert one == same
    assert (one.low, one.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("bounds", "values"),
    [(FRACTION, [0.2, 1, 1]), (DIFFERENCE_OF_FRACTIONS, [-1, 1, 1]), (NONNEGATIVE, [0.0, 0.0, 90.0])],
)
def test_an_interval_is_clipped_to_the_range(bounds: Range, values: list[float]) -> None:
    bootstrap = PatientBootstrap(names(3))
    wide, found = bootstrap.mean(values, UNBOUNDED), bootstrap.mean(values, bounds)
    assert wide.low is not None
    assert wide.high is not None
    assert (found.low, found.high) == (max(wide.low, bounds[0]), min(wide.high, bounds[1]))
    assert (wide.low, wide.high) != (found.low, found.high)


def test_equal_patients_have_the_interval_of_the_rule_of_three() -> None:
    """The exact bound for 20 equal patients is 1 - 0.05 ** (1 / 20) = 13.9 %; the rule of three gives 3 / 20."""
    found = PatientBootstrap(names(20)).mean([1.0] * 20, FRACTION)
    assert (found.low, found.high) == (pytest.approx(0.05 ** (1 / 20)), 1.0)
    same = PatientBootstrap(names(20)).mean([0.0] * 20, DIFFERENCE_OF_FRACTIONS)
    assert (same.low, same.high) == pytest.approx((-0.139, 0.139), abs=1e-3)
    distance = PatientBootstrap(names(20)).mean([0.0] * 20, NONNEGATIVE)
    assert (distance.value, distance.low, distance.high) == (0.0, None, None), "nothing bounds the unseen ones"


def test_one_different_patient_does_not_widen_the_interval_to_the_whole_range() -> None:
    """In a third of the resamples that patient is missing and all others are equal."""
    found = PatientBootstrap(names(50)).mean([0.0] + [1.0] * 49, FRACTION)
    assert found.low is not None
    assert found.low > 0.85  # Clopper and Pearson: 0.894
    assert found.high == 1.0


def test_a_value_defined_by_one_patient_has_no_interval() -> None:
    parts = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])  # only the second has a pixel
    found = PatientBootstrap(["a", "b", "c"]).estimate(parts, divide, FRACTION)[0]
    assert found == Estimate(0.75, None, None, 3, 3)


def test_one_patient_has_a_value_and_no_interval() -> None:
    found = PatientBootstrap(["a", "a"]).mean([0.2, 0.4], FRACTION)
    assert found == Estimate(pytest.approx(0.3), None, None, 2, 1)
    assert found.show() == "0.300"
    assert not found.few_patients


def test_a_mean_of_no_rows_is_undefined() -> None:
    found = PatientBootstrap(["a", "b"]).mean([None, None], FRACTION)
    assert found == Estimate(None, None, None, 0, 0)
    assert found.show() == "–"


def test_missing_values_are_ignored() -> None:
    """Patients without a value are not resampled."""
    found = PatientBootstrap(["a", "b", "c"]).mean([0.5, None, 0.7], FRACTION)
    alone = PatientBootstrap(["a", "c"]).mean([0.5, 0.7], FRACTION)
    assert found == alone
    assert found.value == pytest.approx(0.6)
    assert (found.rows, found.patients) == (2, 2)
    assert found.show(2) == "0.60 [0.00, 1.00]"


def test_few_patients_are_flagged_below_the_documented_number() -> None:
    few, enough = (PatientBootstrap(names(n)).mean(RNG.random(n), FRACTION) for n in (FEW_PATIENTS - 1, FEW_PATIENTS))
    assert few.few_patients
    assert not enough.few_patients
