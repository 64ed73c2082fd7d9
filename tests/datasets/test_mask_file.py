"""Reading masks: accepted and refused files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.mask_file import decode_mask, read_mask
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
    assert [decode_mask(tmp_path / name).form for name in ("m.jpg", "m.png")] == ["lossy", "binary"]
    assert np.mean(read_mask(tmp_path / "m.jpg") != disc()) < 0.002


def test_a_jpeg_image_is_not_a_mask(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (32, 1))).save(tmp_path / "film.jpg")
    with pytest.raises(DataError, match="neither black nor white"):
        read_mask(tmp_path / "film.jpg")


def save(path: Path, values: np.ndarray, **options: int) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path, **options)
    return path


def reduced(labels: np.ndarray, factor: int = 4) -> np.ndarray:
    """Labels reduced by averaging, which makes the edges soft."""
    size = labels.shape[0] // factor
    return labels.reshape(size, factor, size, factor).mean((1, 3)).round()


def test_soft_edges_are_thresholded_at_half_of_the_brightest_value(tmp_path: Path) -> None:
    for brightest in (255, 200):
        values = reduced(disc(384) * brightest)
        decoded = decode_mask(save(tmp_path / "m.png", values))
        assert decoded.form == "soft"
        assert np.array_equal(decoded.inside, values >= brightest / 2)


def test_label_maps_are_not_taken_for_soft_edges(tmp_path: Path) -> None:
    """A cup within a disc as 255 and 128, in the same sizes, with hard and with soft edges; and many small labels."""
    rows, columns = np.ogrid[:384, :384]
    distance = np.hypot(rows - 192, columns - 192)
    nested = np.where(distance < 60, 255, np.where(distance < 100, 128, 0))
    for number, values in enumerate((nested, reduced(nested), np.arange(20)[None] // 2 * np.ones((20, 1)))):
        with pytest.raises(DataError, match="values besides 0"):
            decode_mask(save(tmp_path / f"{number}.png", values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1"], [0, 1, 0, 0]), (["1", "200"], [0, 1, 0, 1]), (["2-255"], [0, 0, 1, 1]), (["nonzero"], [0, 1, 1, 1]),
        (["#010101"], [0, 1, 0, 0]), (["red"], [0, 0, 0, 0]), (["0"], [1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_chosen_gray_values_are_inside(tmp_path: Path, values: list[str], expected: list[int]) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 1, 2, 200]]))
    assert read_mask(path, values).tolist() == [[bool(inside) for inside in expected]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["red"], [0, 1, 0, 0]), (["#00ff00", "#ff0000"], [0, 1, 1, 0]), (["white"], [0, 0, 0, 1]),
        (["nonzero"], [0, 1, 1, 1]), (["255"], [0, 0, 0, 1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_chosen_colors_are_inside(tmp_path: Path, values: list[str], expected: list[int], suffix: str) -> None:
    colors = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]]]).repeat(32, 0).repeat(32, 1)
    path = save(tmp_path / f"m.{suffix}", colors, quality=95)
    inside = read_mask(path, values)
    assert np.mean(inside != np.array([expected], bool).repeat(32, 0).repeat(32, 1)) < 0.02
    assert decode_mask(path, values).form == "colored"


def test_colors_are_counted_in_the_message(tmp_path: Path) -> None:
    colors = np.zeros((10, 10, 3))
    colors[0], colors[1, :5] = (255, 0, 0), (0, 0, 255)
    with pytest.raises(DataError) as refused:
        read_mask(save(tmp_path / "m.png", colors))
    said = str(refused.value)
    assert "3 colors: #000000 (85 %), #ff0000 (10 %), #0000ff (5 %)" in said
    assert "--mask-value '#ff0000' or --mask-value '#0000ff' or --mask-value nonzero for all but black" in said


def test_transparent_pixels_are_outside_and_several_colors_on_them_refused(tmp_path: Path) -> None:
    drawn = np.zeros((4, 4, 4), np.uint8)
    drawn[1:3, 1:3] = (0, 0, 0, 255)
    path = save(tmp_path / "black.png", drawn)
    assert read_mask(path).sum() == 4, "black on transparent ground is inside"
    drawn[0] = (255, 0, 0, 255)
    save(path, drawn)
    with pytest.raises(DataError, match="transparent pixels that do not say what is inside"):
        read_mask(path)
    assert read_mask(path, ["red"]).sum() == 4
