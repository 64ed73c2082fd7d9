"""Statistics over training seeds: mean, standard deviation, Student's interval, paired t test and its power."""

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
    """Mean, standard deviation and 95 % interval over seeds; the latter are None for a single seed."""

    values: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    def show(self, digits: int = 3, signed: bool = False) -> str:
        """Format as `0.853 [0.841, 0.866]`, or as the mean alone without an interval."""
        form = f"{{:{'+' if signed else ''}.{digits}f}}"
        shown = form.format(self.mean)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{form.format(self.low)}, {form.format(self.high)}]"


def seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Return mean, standard deviation and Student's 95 % interval of the mean (n - 1 degrees of freedom).

    A percentile bootstrap would be too narrow for three or five values; docs/evaluation.md has simulated coverages.
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return SeedStatistics(tuple(values), mean, None, None, None)
    sd = stdev(values)
    half = student_quantile(count - 1) * sd / math.sqrt(count)
    return SeedStatistics(tuple(values), mean, sd, mean - half, mean + half)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> SeedStatistics:
    """Return the statistics of value - reference, paired by seed."""
    return seed_statistics([value - other for value, other in zip(values, reference, strict=True)])


def student_p_value(difference: SeedStatistics) -> float:
    """Return the two-sided p value of Student's t test for a true mean of 0; needs at least two values."""
    from scipy.stats import t

    assert difference.sd is not None
    if difference.sd == 0:
        return 0.0 if difference.mean else 1.0
    count = len(difference.values)
    return float(2 * t.sf(abs(difference.mean) / (difference.sd / math.sqrt(count)), count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm's method (1979), which controls the family-wise error rate."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def power_of_paired_test(difference: float, sd: float, pairs: int) -> float:
    """Return the power of a two-sided paired t test at 5 % for a true difference; `sd` is that of the differences."""
    from scipy.stats import ncf, t

    if difference == 0:
        return 1 - CONFIDENCE
    if sd == 0:
        return 1.0
    shift, limit = difference / sd * math.sqrt(pairs), float(t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    return float(ncf.sf(limit**2, 1, pairs - 1, shift**2))  # the square of a noncentral t is noncentral F


def detectable_difference(sd: float, pairs: int) -> float:
    """Return the true difference that a paired t test detects with a power of 80 %."""
    from scipy.optimize import brentq

    # In standard errors of the mean. The bracket holds the largest solution, 16.3 for two pairs.
    errors = brentq(lambda x: power_of_paired_test(x, math.sqrt(pairs), pairs) - POWER, 0.1, 20.0)
    return float(errors) * sd / math.sqrt(pairs)
