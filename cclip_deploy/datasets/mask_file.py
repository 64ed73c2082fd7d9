"""Masks from files: two values, nothing in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import opened_raster

GREY_MODES = frozenset({"1", "L", "P", "I;16", "I"})
LOSSY_FORMATS = frozenset({"JPEG", "MPO"})
LOSSY_THRESHOLD, LOSSY_SLACK, LOSSY_SHARE = 128, 48, 0.02
"""A JPEG mask is cut at half of white; at most this share of its pixels may be farther than the slack from both."""


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask, 0 outside and one other value (1 or 255, as a rule) inside: (H, W) bool.

    Gray, or color with three equal channels. A JPEG file, as Kvasir-SEG has them, cannot hold two values: it is cut at
    half of white (`is_lossy` tells such files). EXIF orientation is applied, as to images.

    Raises:
        DataError: more than two values, or two that are not 0 and another, such as a grayscale picture has.
        ImageError: the file cannot be decoded.
    """
    with opened_raster(path) as file:
        lossy = file.format in LOSSY_FORMATS
        image = ImageOps.exif_transpose(file)
        values = np.asarray(image) if image.mode in GREY_MODES else _equal_channels(path, image)
    return _cut_lossy(path, values) if lossy else _inside(path, values)


def is_lossy(path: Path) -> bool:
    """Whether a mask is kept in a format that does not keep its values, so that `read_mask` cuts it."""
    with opened_raster(path) as image:
        return image.format in LOSSY_FORMATS


def _equal_channels(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in {"RGB", "RGBA", "LA"}:
        channels = np.asarray(image.convert("RGB"))
        opaque = image.mode == "RGB" or image.getextrema()[-1] == (255, 255)
        if opaque and np.ptp(channels, axis=2).max() == 0:
            return channels[..., 0]
    raise DataError(f"Mask {path} has color mode {image.mode} and is no gray. Save it as a gray PNG of 0 and 255.")


def _inside(path: Path, values: NDArray[np.generic]) -> NDArray[np.bool_]:
    inside = np.setdiff1d(values, [0])
    if len(inside) > 1:
        raise DataError(
            f"Mask {path} has {len(inside)} values besides 0 ({', '.join(map(str, inside[:4]))}, ...). "
            "A mask is 0 outside and one other value inside: threshold it first."
        )
    return np.asarray(values != 0)


def _cut_lossy(path: Path, values: NDArray[np.generic]) -> NDArray[np.bool_]:
    levels = values.astype(np.int16)
    between = float(np.mean((levels > LOSSY_SLACK) & (levels < 255 - LOSSY_SLACK)))
    if between > LOSSY_SHARE:
        raise DataError(
            f"Mask {path} is a JPEG file in which {between:.0%} of the pixels are neither black nor white, so it is no "
            "mask. Give the mask, or threshold it and save it as a gray PNG."
        )
    return np.asarray(levels >= LOSSY_THRESHOLD)
