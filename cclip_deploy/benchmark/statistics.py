"""Percentiles of latency samples, and how many times faster one candidate is than another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.median_interval import CONFIDENCE, median_interval

MINIMUM_ROUNDS = 3
FEWEST_ROUNDS_WITH_INTERVAL = 6
"""Of five values, even the least and the largest hold the median between them in only 93.75 % of cases."""


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles of one candidate's rounds; warm-up runs are in none of them.

    `first_ms` is the very first call (compilation, allocation, page faults), None when nothing was warmed up.
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
        """Plain JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class PairedRatio:
    """How many times faster `candidate` is than `baseline`: median over rounds, with its interval.

    `low` and `high` are None where fewer than `FEWEST_ROUNDS_WITH_INTERVAL` rounds were measured. The true median lies
    between them with a probability of at least `confidence`.
    """

    baseline: str
    candidate: str
    ratio: float
    low: float | None
    high: float | None
    confidence: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def summarize(samples_ms: ArrayLike, warmup_ms: ArrayLike = ()) -> LatencySummary:
    """Percentiles of the samples.

    p50 is the median. p90, p95 and p99 are nearest-rank: the smallest sample that at least that share of all samples
    does not exceed, so each is a run that happened. Hence p99 is the maximum while n < 100, and p90 while n < 10; `n`
    stands beside them for that reason.
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
    """Median over rounds of baseline time / candidate time: above 1 where the candidate is faster.

    The interval is `median_interval`'s. It assumes independent rounds, so it does not account for what all rounds of a
    run have in common.

    Args:
        baseline_ms: (n,) samples, positive; round by round those of `candidate_ms`.
        candidate_ms: (n,) samples, positive.
        baseline: its name.
        candidate: its name.

    Raises:
        UsageError: fewer than three rounds, or not the same number of both.
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
