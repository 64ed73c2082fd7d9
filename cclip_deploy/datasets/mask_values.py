"""Values of a mask file that the user names as inside: gray values, ranges, colors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from cclip_deploy.errors import UsageError

NONZERO = "nonzero"
_RANGE = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")

Levels = NDArray[np.integer]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskValue:
    """A range of gray values, one color, or everything that is not 0 (`low` is 1 and `high` is None)."""

    low: int
    high: int | None
    color: tuple[int, int, int] | None = None

    def in_levels(self, levels: Levels, tolerance: int) -> Mask:
        """Return where gray values (H, W) are this value, give or take `tolerance`; a color must be gray to match."""
        if self.high is None:
            return np.asarray(levels > tolerance)
        if self.color is not None and len(set(self.color)) > 1:
            return np.zeros(levels.shape, np.bool_)
        low, high = (self.color[0],) * 2 if self.color is not None else (self.low, self.high)
        return np.asarray((levels >= low - tolerance) & (levels <= high + tolerance))

    def in_colors(self, colors: NDArray[np.uint8], tolerance: int) -> Mask:
        """Return where colors (H, W, 3) are this value, give or take `tolerance` in each channel."""
        if self.high is None:
            return np.asarray(colors.max(axis=2) > tolerance)
        ends = [(c, c) for c in self.color] if self.color is not None else [(self.low, self.high)] * 3
        inside = np.ones(colors.shape[:2], np.bool_)
        for channel, (low, high) in enumerate(ends):
            values = colors[..., channel].astype(np.int16)
            inside &= (values >= low - tolerance) & (values <= high + tolerance)
        return inside


@cache
def parse_mask_value(text: str) -> MaskValue:
    """Parse `1`, `128-255`, `nonzero`, `#ff0000` or a color's name; raise UsageError for other text."""
    if text.strip().lower() == NONZERO:
        return MaskValue(1, None)
    if found := _RANGE.fullmatch(text.strip()):
        low, high = int(found[1]), int(found[2] or found[1])
        if low <= high:
            return MaskValue(low, high)
    else:
        try:
            red, green, blue = ImageColor.getrgb(text.strip())[:3]
            return MaskValue(0, 0, (red, green, blue))
        except ValueError:
            pass
    raise UsageError(
        f"The mask value {text!r} is unknown. Give a gray value (1), a range (128-255), a color ('#ff0000' or red), or "
        f"{NONZERO}."
    )


def choose_levels(levels: Levels, values: Sequence[str], tolerance: int) -> Mask:
    """Return where gray values (H, W) are one of the mask values."""
    inside: Mask = np.any([parse_mask_value(value).in_levels(levels, tolerance) for value in values], axis=0)
    return inside


def choose_colors(colors: NDArray[np.uint8], values: Sequence[str], tolerance: int) -> Mask:
    """Return where colors (H, W, 3) are one of the mask values."""
    inside: Mask = np.any([parse_mask_value(value).in_colors(colors, tolerance) for value in values], axis=0)
    return inside
