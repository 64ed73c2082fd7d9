"""What one predicted mask is worth against its reference: overlap, distance of outlines, and counts for calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import EnvironmentIssue, UsageError

Mask = NDArray[np.bool_]

PROBABILITY_LEVELS = 20
"""Probabilities are counted in twentieths: the thresholds of the curve and the bins of the calibration."""
BOUNDARY_TOLERANCE_PX = 2.0


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of a prediction and its reference."""

    both: int
    predicted: int
    reference: int

    @property
    def dice(self) -> float:
        """2 |A and B| / (|A| + |B|), in [0, 1]; empty against empty counts 1."""
        total = self.predicted + self.reference
        return 2 * self.both / total if total else 1.0

    @property
    def iou(self) -> float:
        """|A and B| / |A or B|, in [0, 1]; empty against empty counts 1."""
        union = self.predicted + self.reference - self.both
        return self.both / union if union else 1.0


@dataclass(frozen=True)
class Outlines:
    """How far two outlines lie from each other, in pixels of the picture."""

    hd95_px: float
    boundary_dice: float


@dataclass(frozen=True)
class Levels:
    """Pixels by their probability p, `inside` and `outside` the reference, (20,) each.

    Bin k holds k/20 <= p < (k+1)/20, the last p = 1 too. `probability` is the sum of p over both, (20,);
    `squared_error` the sum of (p - truth)² over all.
    """

    inside: NDArray[np.int64]
    outside: NDArray[np.int64]
    probability: NDArray[np.float64]
    squared_error: float


def measure_overlap(predicted: Mask, reference: Mask) -> Overlap:
    """Count two masks of one shape."""
    _check_shapes(predicted, reference)
    both = int(np.count_nonzero(predicted & reference))
    return Overlap(both, int(np.count_nonzero(predicted)), int(np.count_nonzero(reference)))


def measure_outlines(predicted: Mask, reference: Mask, tolerance_px: float = BOUNDARY_TOLERANCE_PX) -> Outlines | None:
    """Distances between the outlines of two masks (H, W); None where one is empty and so has no outline.

    An outline is a mask's pixels that have one outside the mask, or outside the picture, above, below, left or right.
    `hd95_px` is the larger of the two 95th percentiles of the distance from one outline to the other (linear
    interpolation). `boundary_dice` is the share of both outlines' pixels that lie within `tolerance_px` of the other:
    the normalized surface Dice of Nikolov et al., 2018.

    Raises:
        EnvironmentIssue: scipy is not installed.
    """
    _check_shapes(predicted, reference)
    if not predicted.any() or not reference.any():
        return None
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise EnvironmentIssue(
            f"Distances of outlines need scipy ({error}). Install it: pip install 'cclip-deploy[train]'"
        ) from error
    window = _window(predicted | reference)
    one, other = _outline(predicted[window]), _outline(reference[window])
    there, back = distance_transform_edt(~other)[one], distance_transform_edt(~one)[other]
    near = np.count_nonzero(there <= tolerance_px) + np.count_nonzero(back <= tolerance_px)
    return Outlines(
        hd95_px=float(max(np.percentile(there, 95), np.percentile(back, 95))),
        boundary_dice=float(near / (there.size + back.size)),
    )


def count_levels(probability: NDArray[np.float32], reference: Mask) -> Levels:
    """Sort the pixels of a probability map (H, W) in [0, 1] into twentieths."""
    _check_shapes(probability, reference)
    level = np.minimum((probability * np.float32(PROBABILITY_LEVELS)).astype(np.uint8), PROBABILITY_LEVELS - 1)
    inside = np.bincount(level[reference], minlength=PROBABILITY_LEVELS)
    every = np.bincount(level.ravel(), minlength=PROBABILITY_LEVELS)
    summed = np.bincount(level.ravel(), weights=probability.ravel(), minlength=PROBABILITY_LEVELS).astype(np.float64)
    error = probability - reference
    return Levels(inside, every - inside, summed, float(np.vdot(error, error)))


def _check_shapes(predicted: NDArray[np.generic], reference: Mask) -> None:
    if predicted.shape != reference.shape:
        raise UsageError(
            f"Masks of {predicted.shape} and {reference.shape} cannot be compared. Resize the prediction first."
        )


def _window(region: Mask) -> tuple[slice, slice]:
    """The least rectangle that holds a region: outlines lie inside it, so distances need no more."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _outline(mask: Mask) -> Mask:
    inner = np.pad(mask, 1)
    outline: Mask = mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])
    return outline
