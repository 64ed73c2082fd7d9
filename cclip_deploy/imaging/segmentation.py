"""Result of a segmentation: mask, probability, area and regions of one prompt on one image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.png import encode_png
from cclip_deploy.imaging.regions import Finding, largest_regions

MOST_FINDINGS = 100
"""Regions that `Segmentation.findings` lists."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What one prompt names in one image, at the image's own size (H, W).

    Everything but the fields is computed when it is first read.

    Attributes:
        prompt: the text that the network read, after repair.
        probability: (H, W) float32 in [0, 1].
        threshold: probability from which a pixel is part of the mask.
        spacing_mm: distances in mm between the centers of rows and of columns; None if they are not known.
        warnings: sentences on a repaired prompt, words that are not understood, and unusual pixels.
    """

    prompt: str
    probability: NDArray[np.float32] = field(repr=False)
    threshold: float
    spacing_mm: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Where the probability is at least the threshold: (H, W) bool."""
        mask: NDArray[np.bool_] = self.probability >= self.threshold
        return mask

    @cached_property
    def area_px(self) -> int:
        """Number of pixels in the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def area_mm2(self) -> float | None:
        """Area of the mask in mm²; None if the pixel spacing is not known."""
        return None if self._pixel_mm2 is None else self.area_px * self._pixel_mm2

    @property
    def area_share(self) -> float:
        """Area of the mask as a fraction of the image, in [0, 1]."""
        return self.area_px / self.mask.size

    @cached_property
    def mean_probability(self) -> float:
        """Mean of the probability over the image."""
        return float(self.probability.mean())

    @cached_property
    def mean_probability_inside(self) -> float | None:
        """Mean of the probability over the mask; None if the mask is empty."""
        return float(self.probability.mean(where=self.mask, dtype=np.float64)) if self.area_px else None

    @cached_property
    def box(self) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the mask in pixels, right and bottom exclusive; None if it is empty."""
        if not self.area_px:
            return None
        columns, rows = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (0, 1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def region_count(self) -> int:
        """Number of connected regions of the mask; pixels that touch at a corner are connected."""
        return self._regions[0]

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The connected regions of the mask, the largest first; at most `MOST_FINDINGS`."""
        return tuple(self._regions[1])

    def mask_png(self, text: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """Return the mask as a PNG file: 8-bit gray, 255 inside, 0 elsewhere; `text` is stored in it by keyword."""
        return encode_png(self.mask.view(np.uint8) * np.uint8(255), text)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but mask and probability in plain types for JSON."""
        return {
            "prompt": self.prompt,
            "threshold": self.threshold,
            "area_px": self.area_px,
            "area_mm2": self.area_mm2,
            "area_share": self.area_share,
            "mean_probability": self.mean_probability,
            "mean_probability_inside": self.mean_probability_inside,
            "box": None if self.box is None else list(self.box),
            "region_count": self.region_count,
            "findings": [finding.to_dict() for finding in self.findings],
            "warnings": list(self.warnings),
        }

    @cached_property
    def _regions(self) -> tuple[int, list[Finding]]:
        return largest_regions(self.mask, MOST_FINDINGS, self._pixel_mm2)

    @property
    def _pixel_mm2(self) -> float | None:
        return None if self.spacing_mm is None else self.spacing_mm[0] * self.spacing_mm[1]


def check_threshold(threshold: float) -> None:
    """Raise UsageError unless a threshold is between 0 and 1."""
    if not 0 < threshold < 1:
        raise UsageError(
            f"The threshold {threshold} is not between 0 and 1. Leave it out to use the bundle's threshold."
        )


def check_spacing(spacing_mm: tuple[float, float]) -> None:
    """Raise UsageError unless a pixel spacing is two positive numbers."""
    if len(spacing_mm) != 2 or not all(0 < side < math.inf for side in spacing_mm):
        raise UsageError(
            f"The pixel spacing {spacing_mm} is not two positive numbers: the distances in mm between rows and between "
            "columns."
        )
