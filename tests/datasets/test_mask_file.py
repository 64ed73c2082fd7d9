"""Reading masks: accepted and refused files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.mask_file import is_lossy, read_mask
from cclip_deploy.errors import DataError


@pytest.mark.parametrize("inside", [1, 255, 7])
def test_a_mask_is_whatever_is_not_zero(tmp_path: Path, inside: int) -> None:
    Image.fromarray(np.array([[0, inside], [inside, 0]], np.uint8)).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, [[False, True], [True, False]])


def test_masks_that_are_not_masks_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(np.array([[[255, 0, 0]]], np.uint8)).save(tmp_path / "color.png")
    (tmp_path / "text.png").write_text("no picture")
    glass = np.array([[[255, 255, 255, 128]]], np.uint8)
    Image.fromarray(glass).save(tmp_path / "glass.png")
    for name, words in (
        ("gray", "2 values besides 0"), ("color", "color mode RGB"), ("text", "is not a complete PNG"),
        ("glass", "color mode RGBA"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            read_mask(tmp_path / f"{name}.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_color_with_equal_channels_is_gray(tmp_path: Path, mode: str) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), [[False, True]])


def disc(size: int = 96) -> np.ndarray:
    rows, columns = np.ogrid[:size, :size]
    return (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 4) ** 2


def test_a_jpeg_mask_is_thresholded_at_half_of_white(tmp_path: Path) -> None:
    Image.fromarray(disc().astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=90)
    Image.fromarray(disc()).save(tmp_path / "m.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "m.jpg")))) > 2, "JPEG does not keep two values"
    assert (is_lossy(tmp_path / "m.jpg"), is_lossy(tmp_path / "m.png")) == (True, False)
    assert np.mean(read_mask(tmp_path / "m.jpg") != disc()) < 0.002


def test_a_jpeg_image_is_not_a_mask(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (32, 1))).save(tmp_path / "film.jpg")
    with pytest.raises(DataError, match="neither black nor white"):
        read_mask(tmp_path / "film.jpg")
