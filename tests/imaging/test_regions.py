"""Connected regions of a mask, compared with scipy.ndimage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from cclip_deploy.imaging import raster_pixels
from cclip_deploy.imaging.regions import largest_regions

EIGHT_NEIGHBORS = np.ones((3, 3))


def by_scipy(mask: np.ndarray) -> list[tuple[int, tuple[int, int, int, int], tuple[float, float]]]:
    labels, count = ndimage.label(mask, EIGHT_NEIGHBORS)
    boxes = ndimage.find_objects(labels)
    centers = ndimage.center_of_mass(mask, labels, range(1, count + 1))
    return sorted(
        (int((labels == n + 1).sum()), (across.start, down.start, across.stop, down.stop), (x, y))
        for n, ((down, across), (y, x)) in enumerate(zip(boxes, centers, strict=True))
    )


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.booleans()))
@settings(deadline=None, max_examples=150)
def test_regions_are_those_of_scipy(mask: np.ndarray) -> None:
    count, found = largest_regions(mask, mask.size)
    expected = by_scipy(mask)
    assert count == len(found) == len(expected)
    areas = [region.area_px for region in found]
    assert areas == sorted(areas, reverse=True)
    for (area, box, center), region in zip(expected, sorted(found, key=lambda r: (r.area_px, r.box)), strict=True):
        assert (region.area_px, region.box) == (area, box)
        assert region.center == pytest.approx(center)


def test_a_spiral_and_a_comb_are_one_region_each() -> None:
    """Labels must travel far through these."""
    snake = np.zeros((101, 60), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    comb = np.zeros((60, 101), bool)
    comb[:, ::2] = True
    comb[-1] = True
    for mask in (snake, comb, comb[::-1], comb.T):
        count, (region,) = largest_regions(mask, 5)
        assert (count, region.area_px) == (1, int(mask.sum()))


def test_only_the_largest_are_listed_but_all_are_counted() -> None:
    mask = np.zeros((40, 40), bool)
    for n in range(10):
        mask[4 * n, : n + 1] = True
    count, found = largest_regions(mask, 3, pixel_mm2=0.5)
    assert count == 10
    assert [(region.area_px, region.area_mm2) for region in found] == [(10, 5.0), (9, 4.5), (8, 4.0)]


def test_an_empty_mask_has_no_region() -> None:
    assert largest_regions(np.zeros((3, 4), bool), 5) == (0, [])


def test_strips_of_a_tall_mask_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(0).random((50, 30)) < 0.5
    whole = largest_regions(mask, 1000)
    monkeypatch.setattr(raster_pixels, "_STRIP_VALUES", 30)
    assert largest_regions(mask, 1000) == whole
