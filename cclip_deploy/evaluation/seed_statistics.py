"""A number over several trainings: mean, standard deviation, Student's interval, paired test and its power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from cclip_deploy.evaluation.bootstrap import student_quantile
from cclip_deploy.evaluation.median_interval import CONFIDENCE

POWER = 0.8


@dataclass(frozen=True)
class SeedStatistics:
    """`sd`, `low` and `high` are None of a single training."""

    values: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    def show(self, digits: int = 3, signed: bool = False) -> str:
        """`0.853 [0.841, 0.866]`, the mean alone where there is no interval."""
        form = f"{{:{'+' if signed else ''}.{digits}f}}"
        shown = form.format(self.mean)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{form.format(self.low)}, {form.format(self.high)}]"


def seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Mean, standard deviation, and Student's 95 % interval of the mean of n independent trainings, n - 1 degrees.

    A percentile bootstrap would be too narrow for three or five values; coverage is in docs/evaluation.md.
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return SeedStatistics(tuple(values), mean, None, None, None)
    sd = stdev(values)
    half = student_quantile(count - 1) * sd / math.sqrt(count)
    return SeedStatistics(tuple(values), mean, sd, mean - half, mean + half)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> SeedStatistics:
    """The spread of value - reference, pair by pair."""
    return seed_statistics([value - other for value, other in zip(values, reference, strict=True)])


def student_p_value(spread: SeedStatistics) -> float:
    """Two-sided p of Student's t test that the true mean is 0; needs two values or more."""
    from scipy.stats import t

    assert spread.sd is not None
    if spread.sd == 0:
        return 0.0 if spread.mean else 1.0
    count = len(spread.values)
    return float(2 * t.sf(abs(spread.mean) / (spread.sd / math.sqrt(count)), count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): below 0.05 is one false finding in all with a chance of 5 %."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def power_of_paired_test(difference: float, sd: float, pairs: int) -> float:
    """Chance that a two-sided paired t test at 5 % finds a true difference, where single differences spread by `sd`."""
    from scipy.stats import ncf, t

    if difference == 0:
        return 1 - CONFIDENCE
    if sd == 0:
        return 1.0
    shift, limit = difference / sd * math.sqrt(pairs), float(t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    return float(ncf.sf(limit**2, 1, pairs - 1, shift**2))  # the square of a noncentral t


def detectable_difference(sd: float, pairs: int) -> float:
    """The true difference that a paired t test finds with a power of 80 %."""
    from scipy.optimize import brentq

    # In standard errors of the mean: 16.3 for two pairs, fewer for more.
    errors = brentq(lambda x: power_of_paired_test(x, math.sqrt(pairs), pairs) - POWER, 0.1, 20.0)
    return float(errors) * sd / math.sqrt(pairs)
