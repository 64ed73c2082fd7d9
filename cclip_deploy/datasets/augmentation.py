"""Random changes to a picture, its mask and its words together: what is true of the one stays true of the others.

Picture and masks are turned and enlarged by MONAI. The flip is ours, as it changes the words too.
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

_Share = Annotated[float, Field(ge=0, le=1)]
_Small = Annotated[float, Field(ge=0, lt=1)]


class Augmentation(StrictModel):
    """How far a picture may be changed; zero everywhere, which is the default, changes nothing."""

    flip_share: _Share = 0.0
    """Probability of a flip left to right. The words are flipped too; a picture whose words cannot be is not flipped.
    On a chest film the heart then lies on the right."""
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Largest turn either way."""
    scale: _Small = 0.0
    """Largest change of size, as a share: 0.1 is from 0.9 to 1.1."""
    gain: _Small = 0.0
    """Largest change of brightness by a factor: 0.1 is from 0.9 to 1.1."""
    gamma: _Small = 0.0
    """Largest change of the tone curve: 0.2 is exponents from 0.8 to 1.2."""


@dataclass(frozen=True)
class Change:
    """One draw: what is done to one picture."""

    flip: bool
    turn_degrees: float
    scale: float
    gain: float
    gamma: float


def draw_change(rng: np.random.Generator, augmentation: Augmentation) -> Change:
    """Every draw takes five numbers from `rng`, so that switching one change on leaves the others as they were."""
    chance, turn, scale, gain, gamma = rng.random(5).tolist()
    return Change(
        flip=bool(chance < augmentation.flip_share),
        turn_degrees=(2 * turn - 1) * augmentation.rotation_degrees,
        scale=1 + (2 * scale - 1) * augmentation.scale,
        gain=1 + (2 * gain - 1) * augmentation.gain,
        gamma=1 + (2 * gamma - 1) * augmentation.gamma,
    )


def apply_change(
    change: Change, pixels: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_], texts: tuple[str, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], tuple[str, ...]]:
    """A picture (H, W) or (H, W, 3) in [0, 1], its masks (P, H, W) and the P texts, changed alike.

    The picture is sampled bilinearly and the masks at half of it; what comes in from outside is black, and in no mask.
    The flip is left out where one of the texts names a side in words that cannot be exchanged (`template.mirror`).
    """
    mirrored = tuple(mirror(text) for text in texts) if change.flip else ()
    if change.flip and all(text is not None for text in mirrored):
        pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        texts = tuple(text for text in mirrored if text is not None)
    if change.turn_degrees or change.scale != 1:
        pixels, masks = _move(change, pixels, masks)
    if change.gain != 1 or change.gamma != 1:
        pixels = np.clip(pixels, 0, 1) ** np.float32(change.gamma) * np.float32(change.gain)
    return np.ascontiguousarray(np.clip(pixels, 0, 1), np.float32), np.ascontiguousarray(masks), texts


def _move(
    change: Change, pixels: npt.NDArray[np.float32], masks: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Turn counter-clockwise and enlarge about the center."""
    import torch
    from monai.transforms import Affine

    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    every = torch.from_numpy(np.concatenate([planes, masks], dtype=np.float32))  # (1 or 3 + P, H, W)
    # MONAI is told where each pixel of the result comes from: the inverse turn and size.
    inverse = {"rotate_params": -math.radians(change.turn_degrees), "scale_params": (1 / change.scale,) * 2}
    moved: npt.NDArray[np.float32] = Affine(**inverse, padding_mode="zeros", image_only=True)(every).numpy()
    there = moved[: len(planes)]
    return there[0] if pixels.ndim == 2 else there.transpose(1, 2, 0), moved[len(planes) :] >= 0.5
