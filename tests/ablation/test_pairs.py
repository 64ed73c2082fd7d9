"""Paired tests of the recorded ablation against scipy and the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from cclip_deploy.ablation.pairs import Rows, compare_pairs, pair_rows, power_rows

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def drops() -> dict[str, list[float]]:
    """Drop of every arm and seed of the recorded ablation."""
    recorded = json.loads((DOCS / "measurements" / "ablation_synthetic_tiny.json").read_text(encoding="utf-8"))
    return {
        arm: [training["numbers"]["drop"] for training in recorded["trainings"] if training["arm"] == arm]
        for arm in recorded["plan"]["arms"]
    }


def test_pairs_of_the_recorded_ablation_match_scipy(drops: dict[str, list[float]]) -> None:
    pairs = compare_pairs(drops)
    assert len(pairs) == 15
    for pair in pairs:
        other = ttest_rel(drops[pair.arm], drops[pair.less])
        interval = other.confidence_interval()
        assert pair.p_value == pytest.approx(other.pvalue, rel=1e-9)
        assert (pair.difference.low, pair.difference.high) == pytest.approx((interval.low, interval.high))
        assert pair.p_value <= pair.p_holm <= 15 * pair.p_value


def test_reversal_drops_more_than_joint_in_every_seed(drops: dict[str, list[float]]) -> None:
    (pair,) = (pair for pair in compare_pairs(drops) if (pair.arm, pair.less) == ("reversal", "joint"))
    assert pair.difference.show(signed=True) == "+0.072 [+0.041, +0.103]"
    assert (pair.higher_in, round(pair.p_value, 3), round(pair.p_holm, 2)) == (5, 0.003, 0.03)


def test_the_documentation_has_every_pair_and_the_power(drops: dict[str, list[float]]) -> None:
    page = (DOCS / "causal-evidence.md").read_text(encoding="utf-8")

    def assert_shown(rows: Rows) -> None:
        for row in rows[1]:
            assert f"| {' | '.join(row)} |" in page

    assert_shown(pair_rows(drops, "drop id − anti"))
    assert_shown(power_rows(drops, "off"))
