"""95 % confidence intervals over patients by the studentized bootstrap, for means, ratios and curves."""

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

UNBOUNDED: Range = (-np.inf, np.inf)
NONNEGATIVE: Range = (0.0, np.inf)
FRACTION: Range = (0.0, 1.0)
DIFFERENCE_OF_FRACTIONS: Range = (-1.0, 1.0)

RESAMPLES = 2000
METHOD = "95 % studentized bootstrap over patients, 2000 resamples"
FEW_PATIENTS = 20
"""Below this number of patients, simulated coverage falls under 93.5 % for some scores: docs/evaluation.md."""
MAX_STUDENT_FACTOR = 2.0
_MAX_ELEMENTS = 2_000_000
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    `value` is None if undefined (a mean of no rows). `low` and `high` are None if there is no interval: fewer than two
    patients have rows, or without one of the patients the value would be undefined.
    """

    value: float | None
    low: float | None
    high: float | None
    rows: int
    patients: int

    @property
    def few_patients(self) -> bool:
        """Whether the interval is based on fewer than `FEW_PATIENTS` patients."""
        return self.low is not None and self.patients < FEW_PATIENTS

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def show(self, digits: int = 3, scale: float = 1.0) -> str:
        """Format as `0.853 [0.841, 0.866]`, as the value alone without an interval, or as a dash without a value."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value * scale:.{digits}f}"
        low, high = self.low * scale, self.high * scale
        return f"{self.value * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


class PatientBootstrap:
    """Studentized bootstrap intervals of the scores of one split; all rows of a patient are resampled together.

    Each end is value - t * standard error, with the jackknife standard error over patients. t is the quantile of
    (resample's value - value) / (resample's standard error) over 2000 resamples of the patients with rows in the score.
    It is clipped to one to two times Student's quantile: below, coverage is too low for skewed scores of few patients;
    above, resamples of nearly equal patients give meaningless values. The interval is clipped to the range of the
    statistic. docs/evaluation.md has simulated coverages.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0) -> None:
        """`patients` has the patient of every row."""
        names, self._owner = np.unique(np.asarray(patients), return_inverse=True)
        self._count, self._seed = len(names), seed

    def estimate(
        self, parts: Floats, statistic: Statistic, bounds: Range, used: NDArray[np.bool_] | None = None
    ) -> list[Estimate]:
        """Estimate statistics of sums over rows.

        Args:
            parts: (rows, K), for all rows of the split.
            statistic: Maps sums of parts (..., K) to values (..., M).
            bounds: Range of the statistic.
            used: (rows,), mask of the rows to use; all if not given.

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
            low, high = _interval(sums, statistic, values, bounds, self._seed)
        rows, patients = int(used.sum()), len(present)
        return [
            Estimate(_nan_to_none(value), _nan_to_none(least), _nan_to_none(most), rows, patients)
            for value, least, most in zip(values, low, high, strict=True)
        ]

    def mean(self, values: Sequence[float | None] | Floats, bounds: Range) -> Estimate:
        """Estimate the mean over the rows whose value is not None or NaN."""
        known = np.array([np.nan if value is None else value for value in values], np.float64)
        used = ~np.isnan(known)
        return self.estimate(np.stack([known, np.ones_like(known)], axis=1), divide, bounds, used)[0]


def divide(sums: Floats) -> Floats:
    """Divide the first part by the second: (..., 2) -> (..., 1)."""
    ratio: Floats = sums[..., :1] / sums[..., 1:2]
    return ratio


def _nan_to_none(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _interval(sums: Floats, statistic: Statistic, values: Floats, bounds: Range, seed: int) -> tuple[Floats, Floats]:
    """Return both ends, (M,) each, NaN if there is no interval. `sums` has the parts of each patient, (patients, K)."""
    patients = len(sums)
    if patients < 2:
        return np.full_like(values, np.nan), np.full_like(values, np.nan)
    (error,) = _jackknife(sums, statistic, np.ones((1, patients)))[1]
    student = student_quantile(patients - 1)
    below, above = _studentized(sums, statistic, values, MAX_STUDENT_FACTOR * student, seed)
    ends = values - np.maximum(above, student) * error, values - np.minimum(below, -student) * error
    lowest, highest = bounds
    # If all patients are equal, up to `unseen` of the population may differ from them (rule of three).
    unseen = 1 - (1 - CONFIDENCE) ** (1 / patients)
    equal = error <= _NO_SPREAD * np.maximum(1, np.abs(values))
    low = np.where(equal, values + unseen * (lowest - values), np.maximum(ends[0], lowest))
    high = np.where(equal, values + unseen * (highest - values), np.minimum(ends[1], highest))
    known = np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _studentized(sums: Floats, statistic: Statistic, values: Floats, most: float, seed: int) -> Floats:
    """Return quantiles of (resample's value - value) / (resample's standard error), clipped to ±`most`: (2, M)."""
    weights, found = _resample_weights(len(sums), seed), []
    chunk = max(1, _MAX_ELEMENTS // sums.size)
    for start in range(0, RESAMPLES, chunk):
        resampled, error = _jackknife(sums, statistic, weights[start : start + chunk].astype(np.float64))
        found.append(np.clip((resampled - values) / error, -most, most))
    ordered = np.sort(np.concatenate(found), axis=0)  # (RESAMPLES, M), NaN last
    last = np.maximum(np.count_nonzero(~np.isnan(ordered), axis=0) - 1, 0)
    tail = (1 - CONFIDENCE) / 2
    ranks = np.rint(np.multiply.outer((tail, 1 - tail), last)).astype(np.intp)
    return np.take_along_axis(ordered, ranks, axis=0)


def _jackknife(sums: Floats, statistic: Statistic, weights: Floats) -> tuple[Floats, Floats]:
    """Return values and standard errors of R resamples, (R, M) each, from patient counts `weights`, (R, patients)."""
    patients = len(sums)
    total = weights @ sums  # (R, K)
    values = statistic(total)
    change = statistic(total[:, None] - sums) - values[:, None]  # (R, patients, M)
    change[weights == 0] = 0
    mean, square = ((weights[:, None] @ power)[:, 0] / patients for power in (change, change**2))
    return values, np.sqrt(np.maximum(square - mean**2, 0) * (patients - 1))


@lru_cache(maxsize=16)
def _resample_weights(patients: int, seed: int) -> NDArray[np.uint16]:
    """Return how often each patient is in each resample, (RESAMPLES, patients)."""
    counts = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), RESAMPLES)
    return counts.astype(np.uint16)


def student_quantile(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; raise EnvironmentIssue if scipy is not installed."""
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise EnvironmentIssue(
            f"Intervals need scipy ({error}). Install it: pip install 'cclip-deploy[evaluate]'"
        ) from error
    return float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))
