"""Preprocessing and resizing back, compared with float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.preprocess import Preprocessing, to_input, to_source

SIDES = st.integers(1, 40)
UNIT = st.floats(0, 1, width=32)
RAW = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    outer = np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    return np.asarray(np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, outer))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(0, 1 - np.abs(x)))


def resize_matrix(length: int, target: int, filter_name: str) -> np.ndarray:
    """(target, length) weights of a resize whose filter widens when it shrinks, pixel centers at i + 0.5."""
    kernel, radius = (cubic, 2) if filter_name == "bicubic" else (triangle, 1)
    scale = length / target
    width = max(scale, 1)
    centers = (np.arange(target) + 0.5) * scale
    offsets = np.arange(length)[None] + 0.5 - centers[:, None]
    weights = kernel(offsets / width)
    # Whole pixels whose center is within the support, rounded as a box of pixels (Pillow and PyTorch agree here).
    first = np.floor(centers - radius * width + 0.5)[:, None]
    last = np.floor(centers + radius * width + 0.5)[:, None]
    index = np.arange(length)[None]
    weights = np.where((index >= first) & (index < last), weights, 0)
    return np.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), [((50, 37), (32, 64)), ((9, 8), (32, 32)), ((200, 130), (32, 32))])
def test_resize_agrees_with_the_filter_s_own_formula(
    filter_name: str, source: tuple[int, int], target: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(1).random((*source, 3)).astype(np.float32)
    rows, columns = (resize_matrix(source[i], target[i], filter_name) for i in range(2))
    expected = np.clip(np.einsum("yh,hwc,xw->cyx", rows, pixels.astype(np.float64), columns), 0, 1)
    actual = to_input(pixels, target, RAW.model_copy(update={"resize_filter": filter_name}))
    np.testing.assert_allclose(actual[0], expected, atol=2e-6)


def test_halving_bilinear_is_the_1_3_3_1_average() -> None:
    line = np.array([[0, 1, 0, 0, 0.5, 0.25, 1, 0]], np.float32)
    actual = to_source(line, (1, 4))
    np.testing.assert_allclose(actual[0, 1], (1 * 1 + 3 * 0 + 3 * 0 + 1 * 0.5) / 8, atol=1e-7)


def test_normalization_is_clip_s() -> None:
    pixels = np.random.default_rng(2).random((32, 32, 3)).astype(np.float32)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = (pixels.astype(np.float64) - mean) / std
    actual = to_input(pixels, (32, 32), Preprocessing())
    assert (actual.dtype.name, actual.shape) == ("float32", (1, 3, 32, 32))
    np.testing.assert_allclose(actual[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_gray_is_the_same_as_three_equal_channels() -> None:
    gray = np.random.default_rng(3).random((45, 60)).astype(np.float32)
    np.testing.assert_array_equal(
        to_input(gray, (32, 64), Preprocessing()), to_input(np.stack([gray] * 3, -1), (32, 64), Preprocessing())
    )


@given(
    pixels=hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=UNIT), name=st.sampled_from(["bilinear", "bicubic"])
)
@settings(deadline=None, max_examples=60)
def test_right_size_is_left_exactly_as_it_is(pixels: np.ndarray, name: str) -> None:
    same = to_input(pixels, (pixels.shape[0], pixels.shape[1]), RAW.model_copy(update={"resize_filter": name}))
    np.testing.assert_array_equal(same[0], np.stack([pixels] * 3))
    np.testing.assert_array_equal(to_source(pixels, (pixels.shape[0], pixels.shape[1])), pixels)


def test_sixteen_bit_depth_survives_the_resize() -> None:
    ramp = (np.arange(65536, dtype=np.float32) / 65535).reshape(256, 256)
    resized = to_input(ramp, (224, 224), RAW)[0, 0]
    assert len(np.unique(np.rint(resized * 65535))) > 40_000


@given(
    shape=st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(3))),
    target=st.tuples(SIDES, SIDES),
    name=st.sampled_from(["bilinear", "bicubic"]),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_input_has_its_shape_and_stays_between_black_and_white(
    shape: tuple[int, ...], target: tuple[int, int], name: str, data: st.DataObject
) -> None:
    pixels = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0, 0.5])))
    chosen = Preprocessing(resize_filter=name)  # type: ignore[arg-type]
    result = to_input(pixels, target, chosen)
    black, white = (to_input(np.full((1, 1), v, np.float32), (1, 1), chosen) for v in (0, 1))
    assert (result.shape, result.dtype.name) == ((1, 3, *target), "float32")
    assert (result >= black).all()
    assert (result <= white).all()


@given(
    probability=hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=UNIT),
    target=st.tuples(SIDES, SIDES),
)
@settings(deadline=None, max_examples=80)
def test_probability_stays_within_its_own_range(probability: np.ndarray, target: tuple[int, int]) -> None:
    result = to_source(probability, target)
    assert (result.shape, result.dtype.name) == (target, "float32")
    assert result.min() >= max(0, probability.min() - 1e-6)
    assert result.max() <= min(1, probability.max() + 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_probability_stays_constant(value: float) -> None:
    result = to_source(np.full((32, 32), value, np.float32), (1841, 55))
    np.testing.assert_allclose(result, value, atol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((4, 4), 255, np.uint8), r"from 255 to 255; the allowed range is \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), "from nan to nan"),
        (np.array([[-0.1, 0.5]], np.float32), "from -0.1 to 0.5"),
        (np.zeros((4, 4, 4), np.float32), r"shape \(4, 4, 4\)"),
        (np.zeros((4,), np.float32), r"shape \(4,\)"),
        (np.zeros((0, 4), np.float32), "from nan"),
    ],
)
def test_pixels_that_are_not_an_image_are_refused(pixels: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        to_input(pixels, (32, 32), Preprocessing())


def test_logits_are_not_taken_for_a_probability() -> None:
    with pytest.raises(UsageError, match="probability: values from -3 to 4"):
        to_source(np.array([[-3, 4]], np.float32), (8, 8))
    with pytest.raises(UsageError, match="at least 1"):
        to_source(np.zeros((2, 2), np.float32), (0, 8))
    with pytest.raises(UsageError, match=r"expected \(h, w\)"):
        to_source(np.zeros((1, 2, 2), np.float32), (4, 8))


def test_preprocessing_goes_through_json_unchanged() -> None:
    chosen = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1, 2, 3), resize_filter="bilinear")
    assert Preprocessing.model_validate_json(chosen.model_dump_json()) == chosen


@pytest.mark.parametrize(
    "values",
    [
        {"std": (0, 1, 1)},
        {"mean": (float("nan"), 0, 0)},
        {"mean": (0, 0)},
        {"resize_filter": "nearest"},
        {"antialias": False},
        {"fit": "pad"},
        {"color": "rgb"},
    ],
)
def test_preprocessing_refuses_what_it_cannot_mean(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate(values)


def test_preprocessing_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Preprocessing().resize_filter = "bilinear"
