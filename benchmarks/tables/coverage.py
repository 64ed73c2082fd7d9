"""Simulated coverage of the 95 % intervals by number of patients, seeds and benchmark rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator

from cclip_deploy.evaluation.bootstrap import (
    DIFFERENCE_OF_FRACTIONS,
    FRACTION,
    NONNEGATIVE,
    RESAMPLES,
    Floats,
    PatientBootstrap,
    Range,
)
from cclip_deploy.evaluation.median_interval import median_interval
from cclip_deploy.evaluation.seed_statistics import seed_statistics

PATIENTS = (3, 5, 10, 20, 50, 100)
SEEDS = (3, 5, 10)
ROUNDS = (3, 5, 6, 8, 10, 20, 30)
MOST_ROWS = 6
_AT_ONCE = 100
_TRUTH = (25, 20_000)


@dataclass(frozen=True)
class PatientScores:
    """Distribution of a score that is a ratio of sums over patients."""

    name: str
    bounds: Range
    draw: Callable[[Generator, int, int], Floats]
    """Maps generator, D data sets and N patients to numerators and denominators of every patient, (2, D, N)."""


@cache
def true_value(case: PatientScores) -> float:
    """Return the score of half a million patients."""
    above, below = case.draw(np.random.default_rng(10**6), *_TRUTH).sum(axis=(1, 2))
    return float(above / below)


def patient_coverage(case: PatientScores, patients: int, data_sets: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return coverage in percent and mean width of three interval methods over `data_sets` simulated data sets.

    Percentile and BCa are scipy's. BCa has no interval if all patients are equal; this counts as a miss.
    """
    rng, truth = np.random.default_rng(seed), true_value(case)
    found: dict[str, list[Floats]] = {}
    for block in range(-(-data_sets // _AT_ONCE)):
        parts = case.draw(rng, min(_AT_ONCE, data_sets - block * _AT_ONCE), patients)
        for method, ends in _intervals(parts, case.bounds, block):
            found.setdefault(method, []).append(ends)
    return [
        {"score": case.name, "patients": patients, "method": method, **_covered(np.concatenate(ends, axis=1), truth)}
        for method, ends in found.items()
    ]


def _intervals(parts: Floats, bounds: Range, seed: int) -> Iterator[tuple[str, Floats]]:
    """Yield each method's name and its lower and upper ends, (2, D), for parts (2, D, N)."""
    from scipy.stats import bootstrap

    above, below = parts
    known: dict[str, Any] = {"paired": True, "axis": 1, "n_resamples": RESAMPLES, "batch": 100, "vectorized": True}
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")
        first = bootstrap((above, below), _ratio, **known, method="percentile", rng=np.random.default_rng(seed))
        again = bootstrap((above, below), _ratio, **{**known, "n_resamples": 0}, method="BCa", bootstrap_result=first)
    yield "percentile", np.stack(first.confidence_interval)
    yield "BCa", np.stack(again.confidence_interval)
    names = [str(patient) for patient in range(above.shape[1])]
    estimates = PatientBootstrap(names, seed).estimate(np.concatenate([above, below]).T, _ratios, bounds)
    yield "studentized", np.array([(e.low, e.high) for e in estimates], np.float64).T


def seed_coverage(distribution: str, count: int, repeats: int) -> dict[str, Any]:
    """Return the coverage in percent of Student's interval for the mean of `count` seeds; the true mean is 0."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        found = seed_statistics(SEED_CASES[distribution](rng, count).tolist())
        hits += found.low is not None and found.high is not None and found.low <= 0 <= found.high
    return {"distribution": distribution, "seeds": count, "coverage": round(100 * hits / repeats, 1)}


def round_coverage(distribution: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Return the coverage in percent of intervals for the median of `rounds` ratios; the true median is 1.

    None for order statistics if there are too few rounds for an interval.
    """
    rng, bootstrapped, ordered = np.random.default_rng(0), 0, 0
    for _ in range(repeats):
        ratios = ROUND_CASES[distribution](rng, rounds)
        low, high = np.percentile(np.median(ratios[rng.integers(0, rounds, (RESAMPLES, rounds))], axis=1), (2.5, 97.5))
        bootstrapped += bool(low <= 1 <= high)
        found = median_interval(ratios)
        ordered += found is not None and found[0] <= 1 <= found[1]
    return {
        "distribution": distribution,
        "rounds": rounds,
        "percentile": round(100 * bootstrapped / repeats, 1),
        "order_statistics": None if found is None else round(100 * ordered / repeats, 1),
    }


def coverage_tables(result: dict[str, Any]) -> str:
    """The measured coverages as Markdown tables: patients, rounds, seeds."""
    methods = ("percentile", "BCa", "studentized")
    found = {(r["score"], r["patients"], r["method"]): f"{r['coverage']:.1f}" for r in result["patients"]}
    lines = ["| score | interval | " + " | ".join(f"{n} patients" for n in PATIENTS) + " |"]
    lines += ["|---" * (2 + len(PATIENTS)) + "|"]
    for score in dict.fromkeys(row["score"] for row in result["patients"]):
        for method in methods:
            lines.append(f"| {score} | {method} | " + " | ".join(found[score, n, method] for n in PATIENTS) + " |")
    for key, columns in (("rounds", ("percentile", "order_statistics")), ("seeds", ("coverage",))):
        lines += ["", f"| distribution | {key} | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines += ["|---" * (2 + len(columns)) + "|"]
        for row in result[key]:
            shown = ("–" if row[column] is None else f"{row[column]:.1f}" for column in columns)
            lines.append(f"| {row['distribution']} | {row[key]} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _covered(ends: Floats, truth: float) -> dict[str, float]:
    low, high = ends
    return {
        "coverage": round(100 * float(np.mean((low <= truth) & (truth <= high))), 1),
        "mean_width": round(float(np.nanmean(high - low)), 4),
    }


def _ratio(above: Floats, below: Floats, axis: int) -> Floats:
    ratio: Floats = above.sum(axis=axis) / below.sum(axis=axis)
    return ratio


def _ratios(sums: Floats) -> Floats:
    above, below = np.split(sums, 2, axis=-1)
    ratio: Floats = above / below
    return ratio


def _rows(rng: Generator, data_sets: int, patients: int) -> tuple[Floats, Floats]:
    """Return which of a patient's `MOST_ROWS` rows exist, (D, N, rows), and the patient's random effect, (D, N, 1)."""
    count = rng.integers(1, MOST_ROWS + 1, (data_sets, patients, 1))
    there = (np.arange(MOST_ROWS) < count).astype(np.float64)
    return there, rng.normal(size=(data_sets, patients, 1))


def _sums(values: Floats, there: Floats) -> Floats:
    return np.stack([(values * there).sum(axis=-1), there.sum(axis=-1)])


def _logistic(logits: Floats) -> Floats:
    share: Floats = 1 / (1 + np.exp(-logits))
    return share


def _dice(rng: Generator, data_sets: int, patients: int) -> Floats:
    there, level = _rows(rng, data_sets, patients)
    dice = _logistic(1.6 + 0.5 * level + 0.7 * rng.normal(size=there.shape))
    chance = rng.random(there.shape)
    return _sums(np.where(chance < 0.08, 0.0, np.where(chance > 0.9, 1.0, dice)), there)


def _difference(rng: Generator, data_sets: int, patients: int) -> Floats:
    there, level = _rows(rng, data_sets, patients)
    own = _logistic(1.6 + 0.4 * level + 0.7 * rng.normal(size=there.shape))
    hit = rng.random(there.shape) < 0.4
    return _sums(own - own * np.where(hit, rng.beta(0.6, 0.8, there.shape), 0.0), there)


def _distance(rng: Generator, data_sets: int, patients: int) -> Floats:
    there, level = _rows(rng, data_sets, patients)
    return _sums(np.exp(1.5 + 0.5 * level + 0.9 * rng.normal(size=there.shape)), there)


def _pooled(rng: Generator, data_sets: int, patients: int) -> Floats:
    there, level = _rows(rng, data_sets, patients)
    log_area = 0.7 * level + 0.7 * rng.normal(size=there.shape)
    dice = _logistic(1.0 + 0.3 * log_area + 0.8 * rng.normal(size=there.shape))
    area = np.exp(log_area) * there
    return np.stack([(dice * area).sum(axis=-1), area.sum(axis=-1)])


def _yes_or_no(alpha: float, beta: float) -> Callable[[Generator, int, int], Floats]:
    def draw(rng: Generator, data_sets: int, patients: int) -> Floats:
        there, _ = _rows(rng, data_sets, patients)
        chance = rng.beta(alpha, beta, (data_sets, patients, 1))
        return _sums((rng.random(there.shape) < chance).astype(np.float64), there)

    return draw


CASES = (
    PatientScores("Dice, mean over rows", FRACTION, _dice),
    PatientScores("Dice, pooled", FRACTION, _pooled),
    PatientScores("paired difference of Dice", DIFFERENCE_OF_FRACTIONS, _difference),
    PatientScores("HD95, heavy tail", NONNEGATIVE, _distance),
    PatientScores("yes or no, 60 % yes", FRACTION, _yes_or_no(1.8, 1.2)),
    PatientScores("yes or no, 95 % yes", FRACTION, _yes_or_no(19.0, 1.0)),
)
SEED_CASES: dict[str, Callable[[Generator, int], Floats]] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "skewed (Gumbel)": lambda rng, count: rng.gumbel(size=count) - np.euler_gamma,
}
ROUND_CASES: dict[str, Callable[[Generator, int], Floats]] = {
    "log-normal": lambda rng, count: np.exp(0.05 * rng.normal(size=count)),
    "one round of ten disturbed": lambda rng, count: np.exp(
        0.05 * rng.normal(size=count) + rng.choice([0.0, -0.4, 0.4], count, p=[0.9, 0.05, 0.05])
    ),
}
