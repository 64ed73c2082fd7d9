"""Augment an image, its masks and its texts consistently.

Rotation and scaling use MONAI. The flip is implemented here, because it also exchanges left and right in the texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.prompts.reader import mirror

_Probability = Annotated[float, Field(ge=0, le=1)]
_Small = Annotated[float, Field(ge=0, lt=1)]


class Augmentation(StrictModel):
    """Ranges of random changes; the default, zero everywhere, changes nothing."""

    flip_share: _Probability = 0.0
    """Probability of a horizontal flip. Left and right in the texts are exchanged too; an image whose texts cannot be
    mirrored is not flipped. In a flipped chest radiograph the heart is on the wrong side."""
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Largest rotation in either direction."""
    scale: _Small = 0.0
    """Largest relative change of size: 0.1 means factors from 0.9 to 1.1."""
    gain: _Small = 0.0
    """Largest relative change of brightness: 0.1 means factors from 0.9 to 1.1."""
    gamma: _Small = 0.0
    """Largest relative change of gamma: 0.2 means exponents from 0.8 to 1.2."""


@dataclass(frozen=True)
class Change:
    """Random changes drawn for one image."""

    flip: bool
    rotation_degrees: float
    scale: float
    gain: float
    gamma: float


def draw_change(rng: np.random.Generator, augmentation: Augmentation) -> Change:
    """Draw the changes for one image.

    Always takes five numbers from `rng`, so enabling one change does not alter the others.
    """
    flip, turn, scale, gain, gamma = rng.random(5).tolist()
    return Change(
        flip=bool(flip < augmentation.flip_share),
        rotation_degrees=(2 * turn - 1) * augmentation.rotation_degrees,
        scale=1 + (2 * scale - 1) * augmentation.scale,
        gain=1 + (2 * gain - 1) * augmentation.gain,
        gamma=1 + (2 * gamma - 1) * augmentation.gamma,
    )


def apply_change(
    change: Change, pixels: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_], texts: tuple[str, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], tuple[str, ...]]:
    """Apply a change to an image (H, W) or (H, W, 3) in [0, 1], its masks (P, H, W) and their P texts.

    The image is sampled bilinearly, and masks are thresholded at 0.5 afterwards; pixels from outside are black and in
    no mask. The flip is skipped if one of the texts cannot be mirrored (`reader.mirror`).
    """
    mirrored = tuple(mirror(text) for text in texts) if change.flip else ()
    if change.flip and all(text is not None for text in mirrored):
        pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        texts = tuple(text for text in mirrored if text is not None)
    if change.rotation_degrees or change.scale != 1:
        pixels, masks = _move(change, pixels, masks)
    if change.gain != 1 or change.gamma != 1:
        pixels = np.clip(pixels, 0, 1) ** np.float32(change.gamma) * np.float32(change.gain)
    return np.ascontiguousarray(np.clip(pixels, 0, 1), np.float32), np.ascontiguousarray(masks), texts


def _move(
    change: Change, pixels: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Rotate counter-clockwise and scale about the center."""
    import torch
    from monai.transforms import Affine

    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    stacked = torch.from_numpy(np.concatenate([planes, masks], dtype=np.float32))  # (1 or 3 + P, H, W)
    # MONAI expects the inverse transform, from output to input coordinates.
    inverse = {"rotate_params": -math.radians(change.rotation_degrees), "scale_params": (1 / change.scale,) * 2}
    moved: npt.NDArray[np.float32] = Affine(**inverse, padding_mode="zeros", image_only=True)(stacked).numpy()
    image = moved[: len(planes)]
    return image[0] if pixels.ndim == 2 else image.transpose(1, 2, 0), moved[len(planes) :] >= 0.5
