"""Convert Pillow images to upright float32 pixels in strips of rows, without full-size temporaries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cclip_deploy.errors import ImageError

UPRIGHT = 1
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0
_EXIF_ORIENTATION = 274
_STRIP_VALUES = 2**20


def row_strips(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows with about a million values each, to process an array without a full-size temporary."""
    rows = max(1, _STRIP_VALUES // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def read_pixels(path: Path, image: Image.Image) -> tuple[NDArray[np.float32], int]:
    """Return upright pixels (H, W) or (H, W, 3) in [0, 1], and the bits per channel; errors name `path`."""
    image.load()
    deep = image.mode.startswith(("I", "F"))
    pixels, bits = _deep_gray(path, image) if deep else _shallow(image)
    return np.ascontiguousarray(_turned(pixels, orientation_of(image.getexif()))), bits


def orientation_of(exif: Image.Exif) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or invalid."""
    found = exif.get(_EXIF_ORIENTATION, UPRIGHT)
    return found if found in range(1, 9) else UPRIGHT


def image_strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield strips of rows of an image: their slice and the cropped image."""
    for rows in row_strips((image.height, image.width)):
        yield rows, image.crop((0, rows.start, image.width, rows.stop))


def _turned(pixels: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """Apply an EXIF orientation (EXIF 2.32, 4.6.4 A)."""
    flipped = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    return np.rot90(flipped, {3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}.get(orientation, 0))


def _deep_gray(path: Path, image: Image.Image) -> tuple[NDArray[np.float32], int]:
    """Scale gray of more than 8 bits to (H, W) in [0, 1]; Pillow ignores depth and polarity of such TIFFs."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = {"I": 16, "F": 32}.get(image.mode) or int(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0])
    white = 1 if image.mode == "F" else 2**bits - 1
    inverted = tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO
    pixels = np.empty((image.height, image.width), np.float32)
    ends = []
    for rows, strip in image_strips(image):
        values = np.asarray(strip)
        ends.append((values.min(), values.max()))
        scaled = np.divide(values, white, dtype=np.float64)
        pixels[rows] = 1 - scaled if inverted else scaled
    low, high = float(np.min(ends)), float(np.max(ends))
    if not (low >= 0 and high <= white):
        raise ImageError(
            f"{path} has values from {low:g} to {high:g}; the allowed range is 0 to {white}. "
            "Scale them and save a 16-bit gray PNG or TIFF."
        )
    return pixels, bits


def _shallow(image: Image.Image) -> tuple[NDArray[np.float32], int]:
    """Scale images of at most 8 bits per channel to gray (H, W) or color (H, W, 3); transparent pixels are black."""
    bits = 1 if image.mode == "1" else 8
    gray = image.mode in {"1", "L", "LA", "La"}
    mode = ("L" if gray else "RGB") + ("A" if image.has_transparency_data else "")
    pixels = np.empty((image.height, image.width) if gray else (image.height, image.width, 3), np.float32)
    for rows, strip in image_strips(image):
        values = np.asarray(strip.convert(mode)).astype(np.float32) / 255
        if mode.endswith("A"):
            values = values[..., :-1] * values[..., -1:]
        pixels[rows] = values.reshape(pixels[rows].shape)
    return pixels, bits
