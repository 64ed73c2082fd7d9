"""A number over several trainings: its mean, its spread, and an interval for the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from cclip_deploy.train.intervals import student_quantile


@dataclass(frozen=True)
class Spread:
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


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, and Student's 95 % interval of the mean of n independent trainings, n - 1 degrees.

    A percentile bootstrap would be too narrow for three or five values; coverage is in docs/evaluation.md.
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return Spread(tuple(values), mean, None, None, None)
    sd = stdev(values)
    half = student_quantile(count - 1) * sd / math.sqrt(count)
    return Spread(tuple(values), mean, sd, mean - half, mean + half)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of value - reference, pair by pair."""
    return spread_of([value - other for value, other in zip(values, reference, strict=True)])
