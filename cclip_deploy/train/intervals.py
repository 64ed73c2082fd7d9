"""Numbers of a data set with their uncertainty: the bootstrap over patients, for means, ratios and curves alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums of parts (..., K) -> values (..., M); 0 / 0 may be NaN."""

RESAMPLES = 2000
_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    `value` is None where nothing defines it (a mean of no rows); `low` and `high` are None where fewer than two
    patients have a part in it, so that there is nothing to redraw.
    """

    value: float | None
    low: float | None
    high: float | None
    rows: int
    patients: int

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
    """How often each patient is drawn in each of 2000 resamples, drawn once and shared by all numbers of a report.

    Sharing the draws makes the intervals of differences paired. A group's interval redraws the patients of the whole
    split, so that the group's own size is uncertain too.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0) -> None:
        """`patients` names the patient of every row."""
        names, self._owner = np.unique(np.asarray(patients), return_inverse=True)
        self._count = len(names)
        draws = np.random.default_rng(seed).integers(0, self._count, (RESAMPLES, self._count))
        self._drawn = np.zeros((RESAMPLES, self._count), np.uint16)
        for row, drawn in zip(self._drawn, draws, strict=True):
            row += np.bincount(drawn, minlength=self._count).astype(np.uint16)

    def estimate(self, parts: Floats, statistic: Statistic, used: NDArray[np.bool_] | None = None) -> list[Estimate]:
        """Statistics of sums: parts (rows, K) of all rows, of which `used` (rows,) count -> M estimates."""
        used = np.ones(len(parts), np.bool_) if used is None else used
        owner, parts = self._owner[used], parts[used]
        sums = np.zeros((self._count, parts.shape[1]))
        np.add.at(sums, owner, parts)
        patients = len(np.unique(owner))
        with np.errstate(invalid="ignore", divide="ignore"):
            values = statistic(sums.sum(axis=0))
            redrawn = np.concatenate([statistic(self._drawn[i : i + _DRAWS_AT_ONCE].astype(np.float64) @ sums)
                                      for i in range(0, RESAMPLES, _DRAWS_AT_ONCE)])  # fmt: skip
        return [
            _summarise(float(value), redrawn[:, column], len(parts), patients) for column, value in enumerate(values)
        ]

    def mean(self, values: Sequence[float | None] | Floats) -> Estimate:
        """The mean over rows; rows whose value is None or NaN take no part."""
        known = np.array([np.nan if value is None else value for value in values], np.float64)
        used = ~np.isnan(known)
        return self.estimate(np.stack([known, np.ones_like(known)], axis=1), divide, used)[0]


def divide(sums: Floats) -> Floats:
    """The first part through the second: (..., 2) -> (..., 1)."""
    ratio: Floats = sums[..., :1] / sums[..., 1:2]
    return ratio


def _summarise(value: float, redrawn: Floats, rows: int, patients: int) -> Estimate:
    known = redrawn[~np.isnan(redrawn)]
    if np.isnan(value):
        return Estimate(None, None, None, rows, patients)
    if patients < 2 or not known.size:
        return Estimate(value, None, None, rows, patients)
    low, high = np.percentile(known, (2.5, 97.5))
    return Estimate(value, float(low), float(high), rows, patients)
