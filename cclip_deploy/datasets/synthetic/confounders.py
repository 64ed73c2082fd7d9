"""Signs on a film that have nothing to do with disease, drawn so that they follow the target with a given probability.

Each sign tells one of the patient's sides: marker, text and collimation by where they stand, gain and blur by how the
whole film looks. They are chosen by a generator of their own, so the film under them is the same with and without.
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
USUAL_RHO = 0.95
OTHER_SIDE = {"left": "right", "right": "left"}
BURNT_IN = {"left": "AP SUPINE\nPORTABLE", "right": "PA ERECT\nROOM 2"}
BRIGHT, DARK = 1.16, 0.86
BLUR_SHARE = 0.007
"""Radius of the blur as a share of the film's height."""


@dataclass(frozen=True)
class Confounding:
    """Which signs are drawn, and how often each stands for the target's side rather than for the other one."""

    kinds: frozenset[str]
    rho: float

    def __post_init__(self) -> None:
        for kind in sorted(self.kinds):
            if kind not in CONFOUNDERS:
                raise UsageError(f"Unknown confounder {kind!r}. Confounders are {', '.join(CONFOUNDERS)}.")
        if not 0 <= self.rho <= 1:
            raise UsageError(f"rho is {self.rho}. It is a probability: use a value from 0 to 1.")


def confound(kinds: Collection[str], rho: float | None) -> Confounding | None:
    """What a command line means: no kinds with a rho are all kinds, kinds without a rho follow with USUAL_RHO."""
    if not kinds and rho is None:
        return None
    return Confounding(frozenset(kinds or CONFOUNDERS), USUAL_RHO if rho is None else rho)


def choose_signs(rng: np.random.Generator, target_side: str, confounding: Confounding | None) -> dict[str, str]:
    """The side that each sign tells. Signs that are not drawn take their chance too, so that the others stay."""
    chances = rng.random(len(CONFOUNDERS))
    if confounding is None:
        return {}
    follows = dict(zip(CONFOUNDERS, chances < confounding.rho, strict=True))
    return {
        kind: target_side if follows[kind] else OTHER_SIDE[target_side]
        for kind in CONFOUNDERS
        if kind in confounding.kinds
    }


def marker_attenuation(image_hw: tuple[int, int], signs: Mapping[str, str]) -> Plane:
    """A lead plate with a letter cut into it, in the upper corner of the side it tells: (H, W), 0 without a marker."""
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    if "marker" in signs:
        pen, outward = ImageDraw.Draw(canvas), OUTWARD[signs["marker"]]
        x, y, half = round(CANVAS_PX * (0.5 + 0.40 * outward)), round(0.075 * CANVAS_PX), round(0.04 * CANVAS_PX)
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
        letter = signs["marker"][0].upper()
        pen.text((x, y), letter, fill=40, font=ImageFont.load_default(1.9 * half), anchor="mm")
    return np.asarray(canvas.resize(image_hw[::-1], Image.Resampling.BOX), np.float32) * np.float32(2 / 255)


def finish_film(film: Pixels, signs: Mapping[str, str]) -> Pixels:
    """The film with gain, blur, collimation and burnt-in text, in this order: (H, W) in [0, 1]."""
    if "gain" in signs:
        film = np.minimum(film * np.float32(BRIGHT if signs["gain"] == "left" else DARK), np.float32(1))
    if signs.get("blur") == "left":
        film = _blur(film)
    if "collimation" in signs:
        film = _collimate(film, signs["collimation"])
    return _burn_in(film, signs["text"]) if "text" in signs else film


def _blur(film: Pixels) -> Pixels:
    radius = BLUR_SHARE * film.shape[0]
    # Pillow's Gaussian takes 8 bits alone.
    soft = Image.fromarray(np.rint(film * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(np.asarray(soft) / 255, np.float32)


def _collimate(film: Pixels, side: str) -> Pixels:
    """A dark shutter along the edge of the side, a little oblique."""
    rows, columns = (np.linspace(0, 1, n, dtype=np.float32) for n in film.shape)
    from_edge = 1 - columns[None, :] if side == "left" else columns[None, :]
    open_share = np.clip((from_edge - 0.045 - 0.025 * rows[:, None]) * film.shape[1] + 0.5, 0, 1)
    return np.asarray(film * (0.02 + 0.98 * open_share), np.float32)


def _burn_in(film: Pixels, side: str) -> Pixels:
    """Two lines of white text with a dark outline in the lower corner of the side."""
    height, width = film.shape
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
    return np.asarray(film * (1 - cover) + ink, np.float32)
