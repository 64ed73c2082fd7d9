"""PNG files that Pillow, an independent reader, reads back equal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.png import encode_png

FORMS = [(np.uint8, (), "L"), (np.uint16, (), "I;16"), (np.uint8, (3,), "RGB")]


@given(st.sampled_from(FORMS), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None, max_examples=80)
def test_pixels_are_read_back_equal(
    form: tuple[type, tuple[int, ...], str], height: int, width: int, seed: int, strided: bool
) -> None:
    dtype, channels, mode = form
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype, endpoint=True)
    pixels = pixels[::-1, ::-1] if strided else pixels
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        image.verify()
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (width, height))
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 2)), np.zeros((0, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.uint16)],
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(UsageError, match="Cannot encode"):
        encode_png(pixels)
