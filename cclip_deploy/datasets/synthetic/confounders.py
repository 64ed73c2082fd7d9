"""Draw confounders on synthetic radiographs: marks unrelated to disease that correlate with the target's side.

Each confounder encodes one side of the patient: marker, text and collimation by their position, gain and blur by the
look of the whole image. They use a random generator of their own, so the radiograph is the same with and without them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cclip_deploy.datasets.synthetic.radiograph import CANVAS_PX, OUTWARD, Plane
from cclip_deploy.errors import UsageError

Pixels = npt.NDArray[np.float32]

CONFOUNDERS = ("marker", "text", "collimation", "gain", "blur")
DEFAULT_RHO = 0.95
OTHER_SIDE = {"left": "right", "right": "left"}
BURNT_IN = {"left": "AP SUPINE\nPORTABLE", "right": "PA ERECT\nROOM 2"}
BRIGHT, DARK = 1.16, 0.86
BLUR_SHARE = 0.007
"""Blur radius as a fraction of the image height."""


@dataclass(frozen=True)
class Confounding:
    """Which confounders are drawn, and the probability `rho` that each encodes the target's side."""

    kinds: frozenset[str]
    rho: float

    def __post_init__(self) -> None:
        for kind in sorted(self.kinds):
            if kind not in CONFOUNDERS:
                raise UsageError(f"Unknown confounder {kind!r}. Confounders are {', '.join(CONFOUNDERS)}.")
        if not 0 <= self.rho <= 1:
            raise UsageError(f"rho is {self.rho}; it is a probability from 0 to 1.")


def make_confounding(kinds: Collection[str], rho: float | None) -> Confounding | None:
    """Build a Confounding from command-line options; no kinds mean all, no rho means DEFAULT_RHO, neither None."""
    if not kinds and rho is None:
        return None
    return Confounding(frozenset(kinds or CONFOUNDERS), DEFAULT_RHO if rho is None else rho)


def choose_confounders(rng: np.random.Generator, target_side: str, confounding: Confounding | None) -> dict[str, str]:
    """Choose the side that each confounder encodes.

    Random numbers are drawn for all kinds, so choosing fewer does not change the others.
    """
    chances = rng.random(len(CONFOUNDERS))
    if confounding is None:
        return {}
    follows = dict(zip(CONFOUNDERS, chances < confounding.rho, strict=True))
    return {
        kind: target_side if follows[kind] else OTHER_SIDE[target_side]
        for kind in CONFOUNDERS
        if kind in confounding.kinds
    }


def marker_attenuation(image_hw: tuple[int, int], confounders: Mapping[str, str]) -> Plane:
    """Return the attenuation (H, W) of a lead marker with a letter, in the upper corner of its side; 0 without one."""
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    if "marker" in confounders:
        pen, outward = ImageDraw.Draw(canvas), OUTWARD[confounders["marker"]]
        x, y, half = round(CANVAS_PX * (0.5 + 0.40 * outward)), round(0.075 * CANVAS_PX), round(0.04 * CANVAS_PX)
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
        letter = confounders["marker"][0].upper()
        pen.text((x, y), letter, fill=40, font=ImageFont.load_default(1.9 * half), anchor="mm")
    return np.asarray(canvas.resize(image_hw[::-1], Image.Resampling.BOX), np.float32) * np.float32(2 / 255)


def apply_confounders(pixels: Pixels, confounders: Mapping[str, str]) -> Pixels:
    """Apply gain, blur, collimation and burnt-in text, in this order, to (H, W) in [0, 1]."""
    if "gain" in confounders:
        pixels = np.minimum(pixels * np.float32(BRIGHT if confounders["gain"] == "left" else DARK), np.float32(1))
    if confounders.get("blur") == "left":
        pixels = _blur(pixels)
    if "collimation" in confounders:
        pixels = _collimate(pixels, confounders["collimation"])
    return _burn_in(pixels, confounders["text"]) if "text" in confounders else pixels


def _blur(pixels: Pixels) -> Pixels:
    radius = BLUR_SHARE * pixels.shape[0]
    # Pillow's Gaussian filter supports 8-bit images only.
    soft = Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(np.asarray(soft) / 255, np.float32)


def _collimate(pixels: Pixels, side: str) -> Pixels:
    """Darken a slightly oblique strip along the edge of a side."""
    rows, columns = (np.linspace(0, 1, n, dtype=np.float32) for n in pixels.shape)
    from_edge = 1 - columns[None, :] if side == "left" else columns[None, :]
    exposed = np.clip((from_edge - 0.045 - 0.025 * rows[:, None]) * pixels.shape[1] + 0.5, 0, 1)
    return np.asarray(pixels * (0.02 + 0.98 * exposed), np.float32)


def _burn_in(pixels: Pixels, side: str) -> Pixels:
    """Draw two lines of white text with a dark outline in the lower corner of a side."""
    height, width = pixels.shape
    canvas = Image.new("LA", (2 * CANVAS_PX, 2 * CANVAS_PX))
    at_left = side == "right"
    ImageDraw.Draw(canvas).multiline_text(
        ((0.03 if at_left else 0.97) * canvas.width, 0.97 * canvas.height),
        BURNT_IN[side], fill=(250, 255), stroke_width=4, stroke_fill=(0, 255),
        font=ImageFont.load_default(canvas.width * 0.045),
        anchor="ld" if at_left else "rd", align="left" if at_left else "right",
    )  # fmt: skip
    planes = (plane.resize((width, height), Image.Resampling.BOX) for plane in canvas.convert("La").split())
    ink, cover = (np.asarray(plane, np.float32) / 255 for plane in planes)
    return np.asarray(pixels * (1 - cover) + ink, np.float32)
