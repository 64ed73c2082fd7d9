"""Paired t tests between all arms of an ablation, corrected for multiple comparisons, and the power of such a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from cclip_deploy.evaluation.seed_statistics import (
    POWER,
    SeedStatistics,
    detectable_difference,
    holm,
    paired_difference,
    power_of_paired_test,
    student_p_value,
)

Rows = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
"""Column titles and rows of text."""

EFFECTS = (0.05, 0.10, 0.15, 0.20)
"""True differences for which the power is reported."""


@dataclass(frozen=True)
class Pair:
    """Difference of a measure between two arms (`arm` minus `less`), paired by seed."""

    arm: str
    less: str
    difference: SeedStatistics
    higher_in: int
    """Number of seeds in which `arm` has the higher value."""
    p_value: float
    """Two-sided, Student's t on the differences."""
    p_holm: float
    """Corrected by Holm's method for all pairs."""


def compare_pairs(values: Mapping[str, Sequence[float]]) -> list[Pair]:
    """Compare every arm with every arm before it; `values` has one value per seed (at least two) for each arm."""
    differences = {(arm, less): paired_difference(values[arm], values[less]) for less, arm in combinations(values, 2)}
    p_values = [student_p_value(difference) for difference in differences.values()]
    return [
        Pair(arm, less, difference, sum(value > 0 for value in difference.values), p_value, p_holm)
        for ((arm, less), difference), p_value, p_holm in zip(
            differences.items(), p_values, holm(p_values), strict=True
        )
    ]


def pair_rows(values: Mapping[str, Sequence[float]], title: str, digits: int = 3) -> Rows:
    """Return the table of `compare_pairs`; `title` names the measure."""
    pairs = compare_pairs(values)
    rows = tuple(
        (
            pair.arm,
            pair.less,
            pair.difference.show(digits, signed=True),
            f"{pair.higher_in} of {len(pair.difference.values)}",
            _p_value(pair.p_value),
            _p_value(pair.p_holm),
        )
        for pair in pairs
    )
    return ("arm", "compared with", title, "higher in", "p", f"p, Holm ({len(pairs)} pairs)"), rows


def power_rows(values: Mapping[str, Sequence[float]], reference: str) -> Rows:
    """Return the power of the paired test of each arm against the reference, given the observed standard deviations."""
    rows = []
    for arm in values:
        if arm == reference:
            continue
        difference = paired_difference(values[arm], values[reference])
        sd, seeds = difference.sd or 0.0, len(difference.values)
        powers = (f"{power_of_paired_test(effect, sd, seeds):.0%}" for effect in EFFECTS)
        rows.append((arm, f"{sd:.3f}", *powers, f"{detectable_difference(sd, seeds):.2f}"))
    titles = (f"power at {effect:.2f}" for effect in EFFECTS)
    return ("arm", f"sd of the difference to {reference}", *titles, f"difference with power {POWER:.0%}"), tuple(rows)


def _p_value(p_value: float) -> str:
    return "<0.001" if p_value < 0.0005 else f"{p_value:.3f}"
