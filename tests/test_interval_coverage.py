"""Tests of the coverage simulation, and of the documentation of its result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tables.coverage import (
    CASES,
    PATIENTS,
    coverage_tables,
    patient_coverage,
    round_coverage,
    seed_coverage,
    true_value,
)
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[dict[str, float]]]:
    measured: dict[str, list[dict[str, float]]] = json.loads(
        (DOCS / "measurements" / "interval_coverage.json").read_text(encoding="utf-8")
    )
    return measured


def test_true_values_match_closed_forms() -> None:
    found = {case.name: true_value(case) for case in CASES}
    assert found["yes or no, 60 % yes"] == pytest.approx(0.6, abs=2e-3)
    assert found["yes or no, 95 % yes"] == pytest.approx(0.95, abs=1e-3)
    assert found["HD95, heavy tail"] == pytest.approx(np.exp(1.5 + (0.5**2 + 0.9**2) / 2), rel=1e-2)


def test_all_methods_use_the_same_data_sets() -> None:
    rows = patient_coverage(CASES[0], 5, 150)
    assert rows == patient_coverage(CASES[0], 5, 150)
    coverage = {row["method"]: row["coverage"] for row in rows}
    assert list(coverage) == ["percentile", "BCa", "studentized"]
    assert coverage["percentile"] < 90 < coverage["studentized"]


def test_coverages_match_theory() -> None:
    assert seed_coverage("normal", 3, 2000)["coverage"] == pytest.approx(95, abs=1.5)
    six = round_coverage("log-normal", 6, 200)
    assert six["order_statistics"] == pytest.approx(100 * (1 - 2 / 2**6), abs=3.5)
    assert round_coverage("log-normal", 5, 1)["order_statistics"] is None


def test_the_documentation_matches_the_recorded_result(recorded: dict[str, list[dict[str, float]]]) -> None:
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    for table in coverage_tables(recorded).split("\n\n"):
        assert table.strip() in text


def test_few_patients_is_the_number_from_which_coverage_is_93_and_a_half_percent(
    recorded: dict[str, list[dict[str, float]]],
) -> None:
    studentized = [row for row in recorded["patients"] if row["method"] == "studentized"]
    least = {n: min(row["coverage"] for row in studentized if row["patients"] == n) for n in PATIENTS}
    assert min(n for n in PATIENTS if all(least[m] >= 93.5 for m in PATIENTS if m >= n)) == FEW_PATIENTS
