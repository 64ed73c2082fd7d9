"""Read binary masks from image files, and check that they have two values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import open_raster

GREY_MODES = frozenset({"1", "L", "P", "I;16", "I"})
LOSSY_FORMATS = frozenset({"JPEG", "MPO"})
LOSSY_THRESHOLD, LOSSY_TOLERANCE, LOSSY_FRACTION = 128, 48, 0.02
"""A JPEG mask is thresholded at half of white; at most this fraction of its pixels may differ from both black and white
by more than the tolerance."""


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read a mask as (H, W) bool; the file has 0 outside and one other value (usually 1 or 255) inside.

    The file is gray, or color with three equal channels. JPEG files, as in Kvasir-SEG, are thresholded at half of white
    (see `is_lossy`). EXIF orientation is applied, as to images.

    Raises:
        DataError: values other than 0 and one other, or a JPEG that is neither black nor white.
        ImageError: the file cannot be decoded.
    """
    with open_raster(path) as file:
        lossy = file.format in LOSSY_FORMATS
        image = ImageOps.exif_transpose(file)
        values = np.asarray(image) if image.mode in GREY_MODES else _equal_channels(path, image)
    return _threshold_lossy(path, values) if lossy else _check_two_values(path, values)


def is_lossy(path: Path) -> bool:
    """Return whether a mask is a JPEG file, which `read_mask` thresholds."""
    with open_raster(path) as image:
        return image.format in LOSSY_FORMATS


def _equal_channels(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in {"RGB", "RGBA", "LA"}:
        channels = np.asarray(image.convert("RGB"))
        opaque = image.mode == "RGB" or image.getextrema()[-1] == (255, 255)
        if opaque and np.ptp(channels, axis=2).max() == 0:
            return channels[..., 0]
    raise DataError(f"Mask {path} has color mode {image.mode} and is not gray. Save it as a gray PNG of 0 and 255.")


def _check_two_values(path: Path, values: NDArray[np.generic]) -> NDArray[np.bool_]:
    inside = np.setdiff1d(values, [0])
    if len(inside) > 1:
        raise DataError(
            f"Mask {path} has {len(inside)} values besides 0 ({', '.join(map(str, inside[:4]))}, ...). "
            "A mask must be 0 outside and one other value inside. Threshold it first."
        )
    return np.asarray(values != 0)


def _threshold_lossy(path: Path, values: NDArray[np.generic]) -> NDArray[np.bool_]:
    levels = values.astype(np.int16)
    between = float(np.mean((levels > LOSSY_TOLERANCE) & (levels < 255 - LOSSY_TOLERANCE)))
    if between > LOSSY_FRACTION:
        raise DataError(
            f"Mask {path} is a JPEG file in which {between:.0%} of the pixels are neither black nor white. Give a "
            "mask, or threshold it and save it as a gray PNG."
        )
    return np.asarray(levels >= LOSSY_THRESHOLD)
