"""Percentiles of latency samples and paired speed-ups."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.median_interval import CONFIDENCE, median_interval

MINIMUM_ROUNDS = 3
FEWEST_ROUNDS_WITH_INTERVAL = 6
"""The range of five values contains the true median in only 93.75 % of cases."""


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles of one candidate's samples without warm-up.

    `first_ms` is the first call (compilation, allocation, page faults); None without warm-up.
    """

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    mean_ms: float
    n: int
    first_ms: float | None
    warmup_n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class PairedRatio:
    """Speed-up of `candidate` over `baseline`: median over rounds, with a confidence interval.

    `low` and `high` are None for fewer than `FEWEST_ROUNDS_WITH_INTERVAL` rounds. Coverage is at least `confidence`.
    """

    baseline: str
    candidate: str
    ratio: float
    low: float | None
    high: float | None
    confidence: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def summarize(samples_ms: ArrayLike, warmup_ms: ArrayLike = ()) -> LatencySummary:
    """Return percentiles of samples.

    p50 is the median. p90, p95 and p99 are nearest-rank percentiles, so each is one of the samples: p99 is the maximum
    if n < 100, p90 if n < 10.
    """
    samples, warmup = np.sort(_as_samples(samples_ms)), np.asarray(warmup_ms, dtype=np.float64)
    return LatencySummary(
        p50_ms=float(np.median(samples)),
        p90_ms=_nearest_rank(samples, 90),
        p95_ms=_nearest_rank(samples, 95),
        p99_ms=_nearest_rank(samples, 99),
        min_ms=float(samples[0]),
        max_ms=float(samples[-1]),
        mean_ms=float(samples.mean()),
        n=samples.size,
        first_ms=float(warmup[0]) if warmup.size else None,
        warmup_n=warmup.size,
    )


def paired_ratio(
    baseline_ms: ArrayLike, candidate_ms: ArrayLike, baseline: str = "baseline", candidate: str = "candidate"
) -> PairedRatio:
    """Return the median over rounds of baseline time / candidate time, above 1 if the candidate is faster.

    The interval is that of `median_interval`. It assumes independent rounds.

    Args:
        baseline_ms: (n,) positive samples, of the same rounds as `candidate_ms`.
        candidate_ms: (n,) positive samples.
        baseline: name of the baseline.
        candidate: name of the candidate.

    Raises:
        UsageError: fewer than three rounds, or different numbers of rounds.
    """
    above, below = _as_samples(baseline_ms), _as_samples(candidate_ms)
    if above.size != below.size or above.size < MINIMUM_ROUNDS:
        raise UsageError(
            f"A paired ratio needs the same {MINIMUM_ROUNDS} or more rounds of both; "
            f"{baseline!r} has {above.size}, {candidate!r} has {below.size}. Measure them in one interleaved run."
        )
    ratios = above / below
    low, high = median_interval(ratios) or (None, None)
    return PairedRatio(baseline, candidate, float(np.median(ratios)), low, high, CONFIDENCE, n=ratios.size)


def _as_samples(samples_ms: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(samples_ms, dtype=np.float64)
    if samples.ndim != 1 or samples.size == 0 or not np.all(np.isfinite(samples) & (samples > 0)):
        raise UsageError(
            f"Latency samples must be a list of positive milliseconds, not an array of shape {samples.shape}"
            f"{f' from {np.min(samples)} to {np.max(samples)}' if samples.size else ''}."
        )
    return samples


def _nearest_rank(ordered: NDArray[np.float64], percent: int) -> float:
    rank = -(-percent * ordered.size // 100)
    return float(ordered[rank - 1])
