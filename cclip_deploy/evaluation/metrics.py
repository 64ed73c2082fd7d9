"""Metrics of one predicted mask against its reference: overlap, boundary distances, and counts for calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import EnvironmentIssue, UsageError

Mask = NDArray[np.bool_]

PROBABILITY_BINS = 20
"""Number of probability bins, for the threshold curve and the calibration."""
BOUNDARY_TOLERANCE_PX = 2.0


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of a prediction, its reference and their intersection (`both`)."""

    both: int
    predicted: int
    reference: int

    @property
    def dice(self) -> float:
        """2 |A ∩ B| / (|A| + |B|), in [0, 1]; 1 if both are empty."""
        total = self.predicted + self.reference
        return 2 * self.both / total if total else 1.0

    @property
    def iou(self) -> float:
        """|A ∩ B| / |A ∪ B|, in [0, 1]; 1 if both are empty."""
        union = self.predicted + self.reference - self.both
        return self.both / union if union else 1.0


@dataclass(frozen=True)
class BoundaryMetrics:
    """Distance between the boundaries of two masks, in pixels of the original image."""

    hd95_px: float
    boundary_dice: float


@dataclass(frozen=True)
class ProbabilityHistogram:
    """Pixel counts by predicted probability p, `inside` and `outside` the reference, (20,) each.

    Bin k holds k/20 <= p < (k+1)/20; the last bin includes p = 1. `probability`, (20,), is the sum of p over a bin's
    pixels; `squared_error` is the sum of (p - reference)² over all pixels.
    """

    inside: NDArray[np.int64]
    outside: NDArray[np.int64]
    probability: NDArray[np.float64]
    squared_error: float


def measure_overlap(predicted: Mask, reference: Mask) -> Overlap:
    """Return the pixel counts of two masks of the same shape."""
    _check_shapes(predicted, reference)
    both = int(np.count_nonzero(predicted & reference))
    return Overlap(both, int(np.count_nonzero(predicted)), int(np.count_nonzero(reference)))


def measure_boundary(
    predicted: Mask, reference: Mask, tolerance_px: float = BOUNDARY_TOLERANCE_PX
) -> BoundaryMetrics | None:
    """Return the boundary distances of two masks, (H, W); None if one of them is empty.

    The boundary of a mask is its pixels with a 4-neighbor outside the mask or the image. `hd95_px` is the larger of the
    95th percentiles of both directed boundary distances (linear interpolation). `boundary_dice` is the fraction of both
    boundaries' pixels within `tolerance_px` of the other boundary: the normalized surface Dice of Nikolov et al., 2018.

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
            f"Boundary distances need scipy ({error}). Install it: pip install 'cclip-deploy[evaluate]'"
        ) from error
    window = _window(predicted | reference)
    one, other = _boundary_pixels(predicted[window]), _boundary_pixels(reference[window])
    there, back = distance_transform_edt(~other)[one], distance_transform_edt(~one)[other]
    near = np.count_nonzero(there <= tolerance_px) + np.count_nonzero(back <= tolerance_px)
    return BoundaryMetrics(
        hd95_px=float(max(np.percentile(there, 95), np.percentile(back, 95))),
        boundary_dice=float(near / (there.size + back.size)),
    )


def probability_histogram(probability: NDArray[np.float32], reference: Mask) -> ProbabilityHistogram:
    """Return the histogram of a probability map, (H, W) in [0, 1]."""
    _check_shapes(probability, reference)
    bins = np.minimum((probability * np.float32(PROBABILITY_BINS)).astype(np.uint8), PROBABILITY_BINS - 1)
    inside = np.bincount(bins[reference], minlength=PROBABILITY_BINS)
    every = np.bincount(bins.ravel(), minlength=PROBABILITY_BINS)
    summed = np.bincount(bins.ravel(), weights=probability.ravel(), minlength=PROBABILITY_BINS).astype(np.float64)
    error = probability - reference
    return ProbabilityHistogram(inside, every - inside, summed, float(np.vdot(error, error)))


def _check_shapes(predicted: NDArray[np.generic], reference: Mask) -> None:
    if predicted.shape != reference.shape:
        raise UsageError(
            f"Masks of shapes {predicted.shape} and {reference.shape} cannot be compared. Resize the prediction first."
        )


def _window(region: Mask) -> tuple[slice, slice]:
    """Return the bounding box of a region. It contains both boundaries, so distances need no more pixels."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _boundary_pixels(mask: Mask) -> Mask:
    inner = np.pad(mask, 1)
    boundary: Mask = mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])
    return boundary
