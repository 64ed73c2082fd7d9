"""The numbers of a segmentation are those of its mask and probability."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.segmentation import MOST_FINDINGS, Segmentation, check_spacing, check_threshold

PROBABILITY = np.array([[0.9, 0.5, 0.1, 0.1], [0.2, 0.1, 0.1, 0.7]], np.float32)


def test_area_mask_and_means() -> None:
    result = Segmentation("left lung", PROBABILITY, 0.5, (0.5, 2.0))
    np.testing.assert_array_equal(result.mask, [[True, True, False, False], [False, False, False, True]])
    assert (result.mask.dtype, result.probability.dtype) == (bool, np.float32)
    assert (result.area_px, result.area_mm2, result.area_share) == (3, 3.0, 3 / 8)
    assert result.mean_probability == pytest.approx(PROBABILITY.mean())
    assert result.mean_probability_inside == pytest.approx(0.7)
    assert result.box == (0, 0, 4, 2)
    assert result.region_count == 2
    first, second = result.findings
    assert (first.area_px, first.area_mm2, first.box, first.center) == (2, 2.0, (0, 0, 2, 1), (0.5, 0.0))
    assert (second.area_px, second.box) == (1, (3, 1, 4, 2))


def test_without_a_spacing_there_are_no_millimeters() -> None:
    result = Segmentation("left lung", PROBABILITY, 0.5)
    assert result.area_mm2 is None
    assert result.findings[0].area_mm2 is None


def test_an_empty_mask() -> None:
    result = Segmentation("left lung", np.zeros((3, 4), np.float32), 0.5)
    assert (result.area_px, result.box, result.mean_probability_inside) == (0, None, None)
    assert (result.region_count, result.findings) == (0, ())


def test_json_has_everything_but_the_arrays() -> None:
    result = Segmentation("left lung", PROBABILITY, 0.5, (0.5, 2.0), ("a warning",))
    told = json.loads(json.dumps(result.to_dict()))
    assert told.keys() == {
        "prompt", "threshold", "area_px", "area_mm2", "area_share", "mean_probability", "mean_probability_inside",
        "box", "region_count", "findings", "warnings",
    }  # fmt: skip
    assert told["findings"][1] == {"area_px": 1, "area_mm2": 1.0, "box": [3, 1, 4, 2], "center": [3.0, 1.0]}
    assert told["warnings"] == ["a warning"]


def test_the_mask_as_a_png_file() -> None:
    result = Segmentation("left lung", PROBABILITY, 0.5)
    with Image.open(io.BytesIO(result.mask_png())) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(image), 255 * result.mask)


def test_it_is_frozen_and_its_repr_is_short() -> None:
    result = Segmentation("left lung", PROBABILITY, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.prompt = "heart"  # type: ignore[misc]
    assert len(repr(result)) < 120


def test_many_specks_are_counted_and_the_largest_listed() -> None:
    specks = np.zeros((60, 60), np.float32)
    specks[::4, ::4] = 1
    result = Segmentation("left lung", specks, 0.5)
    assert result.region_count == 225
    assert len(result.findings) == MOST_FINDINGS


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_thresholds_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        check_threshold(value)


@pytest.mark.parametrize("value", [(0.0, 1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0,), (-1.0, 1.0)])
def test_spacings_out_of_range_are_refused(value: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="is not two positive numbers"):
        check_spacing(value)
