"""Connected regions of a mask, computed from the runs of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.imaging.raster_pixels import row_strips

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    """A connected region of a mask: pixels that touch at an edge or a corner.

    Attributes:
        area_px: number of pixels.
        area_mm2: area in mm²; None if the image's pixel spacing is not known.
        box: left, top, right, bottom in pixels, right and bottom exclusive, as `PIL.Image.crop` takes it.
        center: mean x and y of the pixels; 0, 0 is the center of the top left one.
    """

    area_px: int
    area_mm2: float | None
    box: tuple[int, int, int, int]
    center: tuple[float, float]

    def to_dict(self) -> dict[str, object]:
        """Return plain types for JSON."""
        return {
            "area_px": self.area_px, "area_mm2": self.area_mm2, "box": list(self.box), "center": list(self.center),
        }  # fmt: skip


def largest_regions(mask: NDArray[np.bool_], most: int, pixel_mm2: float | None = None) -> tuple[int, list[Finding]]:
    """Return the number of connected regions of a mask (H, W), and at most `most` of them, the largest first.

    Args:
        mask: (H, W).
        most: length of the list.
        pixel_mm2: area of a pixel, if it is known.
    """
    rows, starts, stops = _runs(mask)
    if not len(rows):
        return 0, []
    found, region = np.unique(_connect(rows, starts, stops, mask.shape[1]), return_inverse=True)
    lengths, count = stops - starts, len(found)
    areas = np.bincount(region, lengths, count)
    left, right = np.full(count, mask.shape[1]), np.zeros(count, np.int64)
    top, bottom = np.full(count, mask.shape[0]), np.zeros(count, np.int64)
    np.minimum.at(left, region, starts)
    np.maximum.at(right, region, stops)
    np.minimum.at(top, region, rows)
    np.maximum.at(bottom, region, rows + 1)
    x = np.bincount(region, lengths * (starts + stops - 1) / 2, count) / areas
    y = np.bincount(region, lengths * rows, count) / areas
    largest = np.argsort(-areas, kind="stable")[:most]
    return count, [
        Finding(
            area_px=int(areas[n]),
            area_mm2=None if pixel_mm2 is None else float(areas[n]) * pixel_mm2,
            box=(int(left[n]), int(top[n]), int(right[n]), int(bottom[n])),
            center=(float(x[n]), float(y[n])),
        )
        for n in largest
    ]


def _runs(mask: NDArray[Any]) -> tuple[_Ints, _Ints, _Ints]:
    """Return row, first column and column after the last of each horizontal run of True, in reading order."""
    found = []
    for strip in row_strips(mask.shape):
        edges = np.diff(np.pad(mask[strip], ((0, 0), (1, 1))).view(np.int8), axis=1)
        rows, starts = np.nonzero(edges == 1)
        found.append((rows + strip.start, starts, np.nonzero(edges == -1)[1]))
    rows, starts, stops = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, starts, stops


def _connect(rows: _Ints, starts: _Ints, stops: _Ints, width: int) -> _Ints:
    """Return a label for each run; runs of one region have the same.

    Each label is replaced by the smallest one of the runs that it touches until none changes. Labels of labels are
    followed after each round, so the number of rounds grows with the logarithm of the number of runs.
    """
    line = width + 2
    above = (rows - 1) * line
    first = np.searchsorted(rows * line + stops, above + starts)
    touching = np.maximum(0, np.searchsorted(rows * line + starts, above + stops, "right") - first)
    one = np.repeat(np.arange(len(rows)), touching)
    offsets = np.arange(len(one)) - np.repeat(np.cumsum(touching) - touching, touching)
    other = np.repeat(first, touching) + offsets
    labels = np.arange(len(rows))
    while True:
        joined = labels.copy()
        smaller = np.minimum(labels[one], labels[other])
        np.minimum.at(joined, labels[one], smaller)
        np.minimum.at(joined, labels[other], smaller)
        while not np.array_equal(joined, joined[joined]):
            joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined
