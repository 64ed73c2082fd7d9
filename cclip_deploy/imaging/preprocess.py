"""Convert image pixels to network input, and resize predicted probabilities back to the image size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.raster_pixels import image_strips

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Preprocessing(StrictModel):
    """Preprocessing of a model, stored in its bundle.

    Mean and standard deviation are CLIP's, for RGB in [0, 1]. The image is stretched to the input size. Pillow always
    antialiases when it shrinks an image, so `antialias` cannot be false.
    """

    mean: tuple[_Finite, _Finite, _Finite] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[_Positive, _Positive, _Positive] = (0.26862954, 0.26130258, 0.27577711)
    resize_filter: Literal["bilinear", "bicubic"] = "bicubic"
    antialias: Literal[True] = True
    fit: Literal["stretch"] = "stretch"


def to_input(pixels: NDArray[Any], image_hw: tuple[int, int], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Resize and normalize (H, W) or (H, W, 3) pixels in [0, 1] to (1, 3, *image_hw) float32.

    Resizing is done in float, so 16-bit depth is preserved; an image of the right size is not changed. Overshoot of the
    bicubic filter is clipped to [0, 1] before normalization.
    """
    return normalize(resize_pixels(pixels, image_hw, preprocessing), preprocessing)[None]


def resize_pixels(pixels: NDArray[Any], image_hw: tuple[int, int], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Resize (H, W) or (H, W, 3) pixels in [0, 1] to (1 or 3, *image_hw) float32: the first step of `to_input`."""
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise UsageError(f"Pixels have shape {pixels.shape}; expected (H, W) or (H, W, 3).")
    check_unit_range("Pixels", pixels)
    channels = [pixels] if pixels.ndim == 2 else [pixels[..., index] for index in range(3)]
    resample = _FILTERS[preprocessing.resize_filter]
    return np.stack([_resize(channel, image_hw, resample) for channel in channels])


def normalize(resized: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Normalize (1 or 3, h, w) in [0, 1] to (3, h, w) with CLIP's mean and deviation: the second step of `to_input`."""
    mean = np.array(preprocessing.mean, dtype=np.float32)[:, None, None]
    std = np.array(preprocessing.std, dtype=np.float32)[:, None, None]
    normalized: NDArray[np.float32] = (resized - mean) / std  # (3, h, w)
    return normalized


def to_source(probability: NDArray[Any], source_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a probability map (h, w) in [0, 1] to (*source_hw) float32 in [0, 1], bilinear."""
    if probability.ndim != 2:
        raise UsageError(f"The probability has shape {probability.shape}; expected (h, w).")
    check_unit_range("The probability", probability)
    return _resize(probability, source_hw, Image.Resampling.BILINEAR)


def check_unit_range(what: str, values: NDArray[Any]) -> None:
    """Raise UsageError if `values` is empty or any value is NaN or outside [0, 1]."""
    low, high = (float(values.min()), float(values.max())) if values.size else (np.nan, np.nan)
    if not (low >= 0 and high <= 1):
        raise UsageError(f"{what}: values from {low:g} to {high:g}; the allowed range is [0, 1]. Scale or check them.")


def _resize(values: NDArray[Any], hw: tuple[int, int], resample: Image.Resampling) -> NDArray[np.float32]:
    if min(hw) < 1:
        raise UsageError(f"Cannot resize to {hw[0]}x{hw[1]} pixels; both sides must be at least 1.")
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).resize((hw[1], hw[0]), resample)
    resized = np.empty(hw, np.float32)
    for rows, strip in image_strips(image):
        np.clip(np.asarray(strip), 0, 1, out=resized[rows])
    return resized
