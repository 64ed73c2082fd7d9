"""Summarize a split's measurements: scores, controls, threshold curve, calibration and subgroups, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.evaluation.bootstrap import (
    DIFFERENCE_OF_FRACTIONS,
    FRACTION,
    NONNEGATIVE,
    Estimate,
    Floats,
    PatientBootstrap,
    divide,
)
from cclip_deploy.evaluation.controls import Control
from cclip_deploy.evaluation.metrics import PROBABILITY_BINS
from cclip_deploy.evaluation.split import MeasuredRow, Measurements
from cclip_deploy.evaluation.subgroups import GROUPINGS, NONE_NAMED, NOT_UNDERSTOOD, group_order, subgroups_of

EmptyPolicy = Literal["one", "leave-out"]
"""Rows with an empty reference: "one" scores Dice and IoU 1 for an empty prediction, else 0; "leave-out" skips them."""
EMPTY_REFERENCE = "the reference is empty, and such rows are left out"
UNKNOWN_GROUP = {"view": "the file name does not contain it"}
THRESHOLDS = tuple(step / PROBABILITY_BINS for step in range(1, PROBABILITY_BINS))


@dataclass(frozen=True)
class Scores:
    """Scores with the rows' own prompts."""

    dice_per_image: Estimate
    iou_per_image: Estimate
    dice_pooled: Estimate
    iou_pooled: Estimate
    hd95_px: Estimate
    boundary_dice: Estimate
    expected_calibration_error: Estimate
    brier: Estimate
    empty_found_empty: Estimate
    """Fraction of rows with an empty reference whose prediction is also empty."""


@dataclass(frozen=True)
class LeftOut:
    """Number of rows left out for a reason."""

    reason: str
    rows: int


@dataclass(frozen=True)
class Coverage:
    """How many rows of the split a score includes, and why the others are left out."""

    rows: int
    rows_in_all: int
    left_out: tuple[LeftOut, ...]

    @staticmethod
    def of_reasons(reasons: Sequence[str]) -> Coverage:
        """Count the reasons of all rows, which are empty for included rows; the most common reason comes first."""
        counted = Counter(reason for reason in reasons if reason)
        left_out = tuple(LeftOut(*pair) for pair in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))
        return Coverage(len(reasons) - counted.total(), len(reasons), left_out)

    def show(self) -> str:
        """Format as `470 of 520`."""
        return f"{self.rows:,} of {self.rows_in_all:,}"

    def describe_left_out(self) -> str:
        """Format as `38: names no side; 12: not understood`."""
        return "; ".join(f"{left.rows:,}: {left.reason}" for left in self.left_out)


@dataclass(frozen=True)
class ControlScore:
    """Scores of a prompt control and of the true prompts on the same rows."""

    name: str
    meaning: str
    missing: str | None
    coverage: Coverage
    drawn: int | None
    """Number of prompts sampled per row; None if all were used."""
    true_dice: Estimate
    dice: Estimate
    difference: Estimate
    """Dice with the true prompt minus Dice with the control's, row by row."""
    iou_with_own: Estimate
    """IoU of the predictions for both prompts; 1 if the prompt has no effect."""


@dataclass(frozen=True)
class ThresholdPoint:
    """Dice at one threshold."""

    threshold: float
    dice_per_image: Estimate
    dice_pooled: Estimate


@dataclass(frozen=True)
class CalibrationBin:
    """Pixels with a probability in [`low`, `high`), their mean probability, and the fraction inside the reference."""

    low: float
    high: float
    pixels: int
    mean_probability: float | None
    inside_share: float | None


@dataclass(frozen=True)
class GroupScore:
    """Dice of the rows of one subgroup."""

    by: str
    group: str
    dice_per_image: Estimate
    dice_pooled: Estimate


@dataclass(frozen=True)
class GroupCoverage:
    """Number of rows whose group is known in one grouping."""

    by: str
    coverage: Coverage


@dataclass(frozen=True)
class Evaluation:
    """All scores of one network on one split."""

    scores: Scores
    controls: tuple[ControlScore, ...]
    curve: tuple[ThresholdPoint, ...]
    calibration: tuple[CalibrationBin, ...]
    groups: tuple[GroupScore, ...]
    group_coverage: tuple[GroupCoverage, ...]
    counted: tuple[bool, ...]
    """Whether each row is included in means over rows."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without `counted`."""
        values = asdict(self)
        del values["counted"]
        return values


def summarize(
    measurements: Measurements,
    samples: Sequence[Sample],
    controls: Sequence[Control],
    empty: EmptyPolicy,
    seed: int = 0,
) -> Evaluation:
    """Compute all scores of a split with 95 % bootstrap intervals over patients."""
    rows = measurements.rows
    bootstrap = PatientBootstrap([sample.subject for sample in samples], seed)
    counted = np.array([empty == "one" or row.overlap.reference > 0 for row in rows], np.bool_)
    dice = np.where(counted, [row.overlap.dice for row in rows], np.nan)
    groups = [subgroups_of(r, row.overlap.reference / row.pixels) for r, row in zip(samples, rows, strict=True)]
    return Evaluation(
        scores=_score(rows, counted, dice, bootstrap),
        controls=tuple(_score_control(control, rows, dice, bootstrap) for control in controls),
        curve=_draw_curve(rows, counted, bootstrap),
        calibration=_calibrate(rows),
        groups=tuple(_score_groups(rows, groups, dice, bootstrap)),
        group_coverage=tuple(_cover_groups(groups)),
        counted=tuple(counted.tolist()),
    )


def _score(
    rows: Sequence[MeasuredRow], counted: NDArray[np.bool_], dice: Floats, bootstrap: PatientBootstrap
) -> Scores:
    counts = _pixel_counts(rows)
    boundaries = [row.boundary if use else None for row, use in zip(rows, counted, strict=True)]
    levels = np.concatenate([_level_sums(rows, "inside"), _level_sums(rows, "every"), _level_sums(rows, "p")], axis=1)
    squared = np.array([(row.histogram.squared_error, row.pixels) for row in rows], np.float64)
    found_empty = [float(r.overlap.predicted == 0) if r.overlap.reference == 0 else None for r in rows]
    return Scores(
        dice_per_image=bootstrap.mean(dice, FRACTION),
        iou_per_image=bootstrap.mean(np.where(counted, [row.overlap.iou for row in rows], np.nan), FRACTION),
        dice_pooled=bootstrap.estimate(counts, _pooled_dice, FRACTION)[0],
        iou_pooled=bootstrap.estimate(counts, _pooled_iou, FRACTION)[0],
        hd95_px=bootstrap.mean([None if b is None else b.hd95_px for b in boundaries], NONNEGATIVE),
        boundary_dice=bootstrap.mean([None if b is None else b.boundary_dice for b in boundaries], FRACTION),
        expected_calibration_error=bootstrap.estimate(levels, _calibration_error, FRACTION)[0],
        brier=bootstrap.estimate(squared, divide, FRACTION)[0],
        empty_found_empty=bootstrap.mean(found_empty, FRACTION),
    )


def _score_control(
    control: Control, rows: Sequence[MeasuredRow], dice: Floats, bootstrap: PatientBootstrap
) -> ControlScore:
    answers = [None if np.isnan(own) else row.controls.get(control.name) for row, own in zip(rows, dice, strict=True)]
    other = np.array([np.nan if answer is None else answer.dice for answer in answers])
    own = np.where(np.isnan(other), np.nan, dice)
    uncounted = [EMPTY_REFERENCE if np.isnan(value) else "" for value in dice]
    return ControlScore(
        name=control.name,
        meaning=control.meaning,
        missing=control.missing,
        coverage=Coverage.of_reasons(
            [reason or empty for reason, empty in zip(control.reasons, uncounted, strict=True)]
        ),
        drawn=control.drawn,
        true_dice=bootstrap.mean(own, FRACTION),
        dice=bootstrap.mean(other, FRACTION),
        difference=bootstrap.mean(own - other, DIFFERENCE_OF_FRACTIONS),
        iou_with_own=bootstrap.mean([None if answer is None else answer.iou_with_own for answer in answers], FRACTION),
    )


def _draw_curve(
    rows: Sequence[MeasuredRow], counted: NDArray[np.bool_], bootstrap: PatientBootstrap
) -> tuple[ThresholdPoint, ...]:
    """Compute Dice at every threshold from the probability histograms."""
    both = np.array([np.cumsum(row.histogram.inside[::-1])[::-1][1:] for row in rows], np.float64)  # (rows, 19)
    above = both + [np.cumsum(row.histogram.outside[::-1])[::-1][1:] for row in rows]
    total = above + np.array([[row.overlap.reference] for row in rows])
    per_row = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    means = bootstrap.estimate(np.column_stack([per_row, np.ones(len(rows))]), _divide_by_last, FRACTION, counted)
    pooled = bootstrap.estimate(np.concatenate([2 * both, total], axis=1), _ratio_of_halves, FRACTION)
    return tuple(ThresholdPoint(*point) for point in zip(THRESHOLDS, means, pooled, strict=True))


def _calibrate(rows: Sequence[MeasuredRow]) -> tuple[CalibrationBin, ...]:
    inside, every, probability = (_level_sums(rows, what).sum(axis=0) for what in ("inside", "every", "p"))
    return tuple(
        CalibrationBin(
            low=level / PROBABILITY_BINS,
            high=(level + 1) / PROBABILITY_BINS,
            pixels=int(every[level]),
            mean_probability=float(probability[level] / every[level]) if every[level] else None,
            inside_share=float(inside[level] / every[level]) if every[level] else None,
        )
        for level in range(PROBABILITY_BINS)
    )


def _score_groups(
    rows: Sequence[MeasuredRow], groups: Sequence[Mapping[str, str]], dice: Floats, bootstrap: PatientBootstrap
) -> list[GroupScore]:
    counts, scored = _pixel_counts(rows), []
    for by in dict.fromkeys(by for group in groups for by in group):
        for name in sorted({group[by] for group in groups if by in group}, key=group_order):
            member = np.array([group.get(by) == name for group in groups], np.bool_)
            pooled = bootstrap.estimate(counts, _pooled_dice, FRACTION, member)[0]
            scored.append(GroupScore(by, name, bootstrap.mean(np.where(member, dice, np.nan), FRACTION), pooled))
    return scored


def _cover_groups(groups: Sequence[Mapping[str, str]]) -> list[GroupCoverage]:
    """Return the coverage of every grouping; "none named" and "not understood" count as unknown."""
    unknown = {NONE_NAMED: NONE_NAMED, NOT_UNDERSTOOD: NOT_UNDERSTOOD}
    return [
        GroupCoverage(
            by, Coverage.of_reasons([unknown.get(g[by], "") if by in g else UNKNOWN_GROUP[by] for g in groups])
        )
        for by in GROUPINGS
        if any(by in group for group in groups)
    ]


def _pixel_counts(rows: Sequence[MeasuredRow]) -> Floats:
    """Return the intersection and the sum of both areas of every row in pixels, (rows, 2)."""
    return np.array([(r.overlap.both, r.overlap.predicted + r.overlap.reference) for r in rows], np.float64)


def _level_sums(rows: Sequence[MeasuredRow], what: Literal["inside", "every", "p"]) -> Floats:
    """Return counts, or sums of probabilities for "p", of every row and bin, (rows, 20)."""
    if what == "p":
        return np.array([row.histogram.probability for row in rows], np.float64)
    if what == "inside":
        return np.array([row.histogram.inside for row in rows], np.float64)
    return np.array([row.histogram.inside + row.histogram.outside for row in rows], np.float64)


def _pooled_dice(sums: Floats) -> Floats:
    dice: Floats = 2 * sums[..., :1] / sums[..., 1:]
    return dice


def _pooled_iou(sums: Floats) -> Floats:
    iou: Floats = sums[..., :1] / (sums[..., 1:] - sums[..., :1])
    return iou


def _calibration_error(sums: Floats) -> Floats:
    """Expected calibration error: pixel-weighted mean of |mean probability - fraction inside| over bins.

    Naeini et al., AAAI 2015.
    """
    inside, every, probability = np.split(sums, 3, axis=-1)
    gap: Floats = np.abs(probability - inside).sum(axis=-1, keepdims=True) / every.sum(axis=-1, keepdims=True)
    return gap


def _divide_by_last(sums: Floats) -> Floats:
    ratios: Floats = sums[..., :-1] / sums[..., -1:]
    return ratios


def _ratio_of_halves(sums: Floats) -> Floats:
    upper, lower = np.split(sums, 2, axis=-1)
    ratio: Floats = upper / lower
    return ratio
