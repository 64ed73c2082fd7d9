"""Values of a data set with 95 % intervals over patients: the studentized bootstrap, for means, ratios and curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.evaluation.median_interval import CONFIDENCE

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums of parts (..., K) -> values (..., M); 0 / 0 may be NaN."""
Range = tuple[float, float]

ANY: Range = (-np.inf, np.inf)
NOT_NEGATIVE: Range = (0.0, np.inf)
SHARE: Range = (0.0, 1.0)
DIFFERENCE_OF_SHARES: Range = (-1.0, 1.0)

RESAMPLES = 2000
METHOD = "95 % studentized bootstrap over patients, 2000 resamples"
FEW_PATIENTS = 20
"""From this number of patients on, simulated coverage is 93.5 % or more for every kind of score: docs/evaluation.md."""
MOST_TIMES_STUDENT = 2.0
_ELEMENTS_AT_ONCE = 2_000_000
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    `value` is None where nothing defines it (a mean of no rows). `low` and `high` are None where the interval cannot be
    computed: fewer than two patients have rows in the value, or the value exists because of a single one of them.
    """

    value: float | None
    low: float | None
    high: float | None
    rows: int
    patients: int

    @property
    def few_patients(self) -> bool:
        """Whether there is an interval and it rests on fewer than `FEW_PATIENTS` patients."""
        return self.low is not None and self.patients < FEW_PATIENTS

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    def show(self, digits: int = 3, scale: float = 1.0) -> str:
        """`0.853 [0.841, 0.866]`, the value alone where there is no interval, or a dash."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value * scale:.{digits}f}"
        low, high = self.low * scale, self.high * scale
        return f"{self.value * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


class PatientBootstrap:
    """Intervals of numbers of one split; all rows of a patient are redrawn together.

    The interval is value - t * standard error, at both ends. The standard error is the jackknife's over patients. t is
    the quantile of (resample's value - value) / (resample's standard error) over 2000 resamples of the patients that
    have rows in the number, held between one and two times Student's quantile: below it, skewed scores of few patients
    are covered too rarely; above it, a resample of nearly equal patients would say more than it knows. An interval
    ends where the range of the statistic ends. How often it covers the true value: docs/evaluation.md.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0) -> None:
        """`patients` names the patient of every row."""
        names, self._owner = np.unique(np.asarray(patients), return_inverse=True)
        self._count, self._seed = len(names), seed

    def estimate(
        self, parts: Floats, statistic: Statistic, within: Range, used: NDArray[np.bool_] | None = None
    ) -> list[Estimate]:
        """Statistics of sums over rows.

        Args:
            parts: (rows, K), of all rows of the split.
            statistic: sums of parts (..., K) -> values (..., M).
            within: the range of the statistic.
            used: (rows,), the rows that count; all unless given.

        Returns:
            M estimates.

        Raises:
            EnvironmentIssue: scipy is not installed.
        """
        used = np.ones(len(parts), np.bool_) if used is None else used
        present, owner = np.unique(self._owner[used], return_inverse=True)
        sums = np.zeros((len(present), parts.shape[1]))  # (patients, K)
        np.add.at(sums, owner, parts[used])
        with np.errstate(invalid="ignore", divide="ignore"):
            values = statistic(sums.sum(axis=0))  # (M,)
            low, high = _interval(sums, statistic, values, within, self._seed)
        rows, patients = int(used.sum()), len(present)
        return [
            Estimate(_known(value), _known(least), _known(most), rows, patients)
            for value, least, most in zip(values, low, high, strict=True)
        ]

    def mean(self, values: Sequence[float | None] | Floats, within: Range) -> Estimate:
        """The mean over rows; rows whose value is None or NaN take no part."""
        known = np.array([np.nan if value is None else value for value in values], np.float64)
        used = ~np.isnan(known)
        return self.estimate(np.stack([known, np.ones_like(known)], axis=1), divide, within, used)[0]


def divide(sums: Floats) -> Floats:
    """The first part through the second: (..., 2) -> (..., 1)."""
    ratio: Floats = sums[..., :1] / sums[..., 1:2]
    return ratio


def _known(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _interval(sums: Floats, statistic: Statistic, values: Floats, within: Range, seed: int) -> tuple[Floats, Floats]:
    """Both ends, (M,) each; NaN where there is none. `sums` are the patients', (patients, K)."""
    patients = len(sums)
    if patients < 2:
        return np.full_like(values, np.nan), np.full_like(values, np.nan)
    (error,) = _jackknife(sums, statistic, np.ones((1, patients)))[1]
    student = student_quantile(patients - 1)
    below, above = _studentized(sums, statistic, values, MOST_TIMES_STUDENT * student, seed)
    ends = values - np.maximum(above, student) * error, values - np.minimum(below, -student) * error
    lowest, highest = within
    # Where no patient differs from another, by the rule of three, others may differ in up to `share` of all patients.
    share = 1 - (1 - CONFIDENCE) ** (1 / patients)
    alike = error <= _NO_SPREAD * np.maximum(1, np.abs(values))
    low = np.where(alike, values + share * (lowest - values), np.maximum(ends[0], lowest))
    high = np.where(alike, values + share * (highest - values), np.minimum(ends[1], highest))
    known = np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _studentized(sums: Floats, statistic: Statistic, values: Floats, most: float, seed: int) -> Floats:
    """Quantiles of (resample's value - value) / (resample's standard error), held within `most`: (2, M)."""
    drawn, found = _draws(len(sums), seed), []
    at_once = max(1, _ELEMENTS_AT_ONCE // sums.size)
    for start in range(0, RESAMPLES, at_once):
        redrawn, error = _jackknife(sums, statistic, drawn[start : start + at_once].astype(np.float64))
        found.append(np.clip((redrawn - values) / error, -most, most))
    ordered = np.sort(np.concatenate(found), axis=0)  # (RESAMPLES, M), NaN last
    last = np.maximum(np.count_nonzero(~np.isnan(ordered), axis=0) - 1, 0)
    tail = (1 - CONFIDENCE) / 2
    ranks = np.rint(np.multiply.outer((tail, 1 - tail), last)).astype(np.intp)
    return np.take_along_axis(ordered, ranks, axis=0)


def _jackknife(sums: Floats, statistic: Statistic, weights: Floats) -> tuple[Floats, Floats]:
    """Values and standard errors of resamples, (R, M) each, by how often each patient is in them, (R, patients)."""
    patients = len(sums)
    total = weights @ sums  # (R, K)
    values = statistic(total)
    change = statistic(total[:, None] - sums) - values[:, None]  # (R, patients, M)
    change[weights == 0] = 0
    mean, square = ((weights[:, None] @ power)[:, 0] / patients for power in (change, change**2))
    return values, np.sqrt(np.maximum(square - mean**2, 0) * (patients - 1))


@lru_cache(maxsize=16)
def _draws(patients: int, seed: int) -> NDArray[np.uint16]:
    """How often each patient is in each resample, (RESAMPLES, patients)."""
    counts = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), RESAMPLES)
    return counts.astype(np.uint16)


def student_quantile(degrees_of_freedom: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it; EnvironmentIssue where scipy is not installed."""
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise EnvironmentIssue(
            f"Intervals need scipy ({error}). Install it: pip install 'cclip-deploy[train]'"
        ) from error
    return float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))
