"""Generate a synthetic frontal chest radiograph: lungs, heart, spine, ribs, vessels and film exposure.

Lengths are fractions of the image: y is 0 at the top and 1 at the bottom; x is 0 at the midline, positive toward the
patient's left (the right of the image). Tissue adds attenuation and air subtracts it; the film shows the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Plane = npt.NDArray[np.floating[Any]]

OUTWARD = {"left": 1.0, "right": -1.0}
"""Sign of x away from the midline."""
CANVAS_PX = 320
"""Side of the canvas for fine lines, which is then resized to the image."""
RIB_SPACING = 0.078


@dataclass(frozen=True)
class Frame:
    """Body coordinates of every pixel, after random size, shift and tilt of the patient."""

    x: Plane  # (H, W)
    y: Plane  # (H, W)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x.shape[0], self.x.shape[1]


@dataclass(frozen=True)
class Chest:
    """Attenuation of a healthy chest, and the lungs."""

    frame: Frame
    attenuation: Plane  # (H, W), about 0 (air) to 1.5 (abdomen)
    lungs: Mapping[str, Plane]  # side -> (H, W) in [0, 1], 0 outside


def draw_chest(rng: np.random.Generator, image_hw: tuple[int, int]) -> Chest:
    """Draw a healthy chest of `image_hw` pixels; all randomness comes from `rng`."""
    frame = place_patient(rng, image_hw)
    depth = rng.uniform(0.0, 0.035)
    lungs = {side: _draw_lung(frame, side, depth, rng.uniform(-0.012, 0.012)) for side in OUTWARD}
    heart = _draw_heart(frame, rng)
    air = (lungs["left"] + lungs["right"]) * (1 - 0.85 * heart)
    attenuation = _draw_trunk(frame, rng) + 0.14 * heart - rng.uniform(0.52, 0.60) * air
    attenuation += _draw_spine(frame) + _draw_abdomen(frame, rng, depth)
    attenuation += _draw_ribs(frame, rng) + _draw_shoulders(frame, rng) + air * _draw_vessels(frame, rng)
    return Chest(frame, attenuation, lungs)


def place_patient(rng: np.random.Generator, image_hw: tuple[int, int]) -> Frame:
    """Return coordinates for a patient with random offset, tilt and size."""
    height, width = image_hw
    rows = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height - 0.5
    columns = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width - 0.5
    tilt = math.radians(rng.uniform(-2.5, 2.5))
    x_scale, y_scale = rng.uniform(0.96, 1.08), rng.uniform(0.95, 1.05)
    x_shift, y_shift = rng.uniform(-0.02, 0.02), rng.uniform(-0.015, 0.02)
    x = x_scale * (math.cos(tilt) * columns + math.sin(tilt) * rows) + x_shift
    y = y_scale * (math.cos(tilt) * rows - math.sin(tilt) * columns) + y_shift + 0.5
    return Frame(x.astype(np.float32), y.astype(np.float32))


def lung_span(side: str, y: float) -> tuple[float, float]:
    """Return the medial and lateral distance from the midline between which a lung is free of heart and wall at `y`."""
    below_aorta = min(max((y - 0.42) / 0.18, 0.0), 1.0)
    medial = 0.075 + (0.135 if side == "left" else 0.035) * below_aorta
    return medial, float(_chest_wall(np.array(y)))


def step(distance: Plane, width: float) -> Plane:
    """Smooth step from 0 to 1: one half at distance 0, over about 2 x `width` on either side."""
    scaled = np.clip(distance / (2 * width), -1, 1)
    smooth: Plane = 0.5 + scaled * (0.75 - 0.25 * scaled * scaled)
    return smooth


def smooth_noise(rng: np.random.Generator, image_hw: tuple[int, int], cells: int) -> Plane:
    """Return noise (H, W) of mean 0 and standard deviation about 1, with `cells` grains across the image."""
    lattice = rng.standard_normal((cells, cells)).astype(np.float32)
    resized = Image.fromarray(lattice).resize(image_hw[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) * np.float32(1.4)


def expose(rng: np.random.Generator, attenuation: Plane) -> npt.NDArray[np.float32]:
    """Expose a film: add fog, grain, vignette and a tone curve to attenuation; returns (H, W) in [0, 1]."""
    height, width = attenuation.shape
    fog = 0.03 * smooth_noise(rng, (height, width), 5) + 0.014 * smooth_noise(rng, (height, width), 40)
    film = 1 - np.exp(-1.25 * np.maximum(attenuation + fog, 0))
    film = (film / 0.80) ** rng.uniform(0.95, 1.25)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    film = film * rng.uniform(0.92, 1.04) * (1 - 0.10 * (rows**2 + columns**2))
    film += 0.014 * rng.standard_normal((height, width), dtype=np.float32)
    return np.clip(film + 0.02, 0, 1).astype(np.float32)


def _chest_wall(y: Plane) -> Plane:
    """Distance from the midline to the inner chest wall: 0.1 at the apex, largest near the diaphragm."""
    t = np.clip((y - 0.115) / 0.68, 0, 1)
    wall: Plane = 0.105 + 0.265 * (1 - (1 - t) ** 2.6) ** 0.6
    return wall


def _diaphragm(side: str, outward: Plane, depth: float) -> Plane:
    """Height of the diaphragm's dome at each distance from the midline; the right one is higher."""
    top = (0.735 if side == "right" else 0.76) + depth
    away = outward - 0.155
    dome: Plane = top + np.where(away > 0, 2.4, 0.9) * np.square(away)
    return dome


def _draw_lung(frame: Frame, side: str, depth: float, apex: float) -> Plane:
    outward = OUTWARD[side] * frame.x
    wall = _chest_wall(frame.y) - outward
    medial = outward - 0.05 - 0.015 * step(frame.y - 0.5, 0.1)
    top = frame.y - (0.125 + apex) - 2.2 * np.square(outward - 0.135)
    below = _diaphragm(side, outward, depth) - frame.y
    profile = np.ones_like(frame.x)
    for distance, reach in ((wall, 0.055), (medial, 0.045), (top, 0.06), (below, 0.03)):
        inside = np.clip(distance / reach, 0, 1)
        profile *= inside * (2 - inside)
    return profile


def _draw_trunk(frame: Frame, rng: np.random.Generator) -> Plane:
    """Soft tissue: thick in the middle, thin at the flanks, none above the shoulders."""
    outward = np.abs(frame.x)
    flank = rng.uniform(0.435, 0.475) + 0.04 * np.square(frame.y - 0.55) + 0.25 * step(0.27 - frame.y, 0.05)
    shoulder = frame.y - 0.02 - 0.35 * np.maximum(outward - 0.13, 0) ** 1.25 * step(outward - 0.13, 0.03)
    thickness = np.sqrt(np.clip(1 - np.square(outward / flank), 0, 1))
    tissue: Plane = (0.30 + 0.42 * thickness) * step(flank - outward, 0.008) * step(shoulder, 0.008)
    return tissue


def _ellipse(frame: Frame, center: tuple[float, float], radii: tuple[float, float], edge: float) -> Plane:
    """Ellipse with a soft edge: 1 inside, 0 outside."""
    distance = np.hypot((frame.x - center[0]) / radii[0], (frame.y - center[1]) / radii[1])
    return step((1 - distance) * min(radii), edge)


def _draw_heart(frame: Frame, rng: np.random.Generator) -> Plane:
    size = rng.uniform(0.9, 1.12)
    ventricle = _ellipse(frame, (0.07, 0.645), (0.145 * size, 0.115 * size), 0.016)
    atrium = _ellipse(frame, (-0.022, 0.63), (0.072 * size, 0.125), 0.014)
    trunk = _ellipse(frame, (0.03, 0.46), (0.072, 0.13), 0.018)
    aorta = _ellipse(frame, (0.04, rng.uniform(0.29, 0.32)), (0.052, 0.05), 0.009)
    mediastinum = step(0.052 - np.abs(frame.x + 0.006), 0.01) * step(0.7 - frame.y, 0.04)
    shadow = 1 - (1 - ventricle) * (1 - atrium) * (1 - 0.8 * trunk) * (1 - 0.7 * aorta) * (1 - 0.6 * mediastinum)
    hila = sum(
        np.exp(-np.square((frame.x - x) / 0.032) - np.square((frame.y - y) / 0.06))
        for x, y in ((-0.095, 0.45), (0.1, 0.42))
    )
    heart: Plane = np.minimum(shadow + 0.30 * hila, 1)
    return heart


def _draw_spine(frame: Frame) -> Plane:
    outward = np.abs(frame.x)
    column = step(0.036 - outward, 0.008)
    discs = 0.5 + 0.5 * np.cos(2 * math.pi * frame.y / 0.058)
    trachea = step(0.017 - np.abs(frame.x + 0.003), 0.006) * step(0.36 - frame.y, 0.03)
    spine: Plane = column * (0.06 + 0.06 * discs) - 0.17 * trachea
    return spine


def _draw_abdomen(frame: Frame, rng: np.random.Generator, depth: float) -> Plane:
    """Tissue below the diaphragm, with the gastric air bubble."""
    left = step(frame.x, 0.04)
    domes = left * _diaphragm("left", frame.x, depth) + (1 - left) * _diaphragm("right", -frame.x, depth)
    abdomen = 0.26 * step(frame.y - domes, 0.008)
    bubble = _ellipse(frame, (rng.uniform(0.12, 0.18), 0.84 + depth), (0.06, rng.uniform(0.02, 0.035)), 0.012)
    return abdomen - rng.uniform(0.0, 0.35) * bubble


def _rib_band(phase: Plane, half_width: float) -> Plane:
    """Periodic bars, brighter along the edges like cortical bone."""
    distance = np.abs(phase - np.floor(phase) - 0.5)
    band: Plane = step(half_width - distance, 0.05) * (0.55 + 0.45 * np.square(distance / half_width))
    return band


def _draw_ribs(frame: Frame, rng: np.random.Generator) -> Plane:
    outward = np.abs(frame.x)
    cage = step(_chest_wall(frame.y) + 0.02 - outward, 0.012) * step(frame.y - 0.10, 0.015) * step(0.92 - frame.y, 0.05)
    start = rng.uniform(0, RIB_SPACING)
    back = (frame.y - start + 0.10 * outward - 1.05 * np.square(outward)) / RIB_SPACING
    front = (frame.y - start - 0.02 + 0.75 * outward - 0.55 * np.square(outward)) / (1.35 * RIB_SPACING)
    posterior = _rib_band(back, 0.24) * step(outward - 0.03, 0.01)
    anterior = _rib_band(front, 0.22) * step(outward - 0.19, 0.03)
    return rng.uniform(0.8, 1.2) * cage * (0.15 * posterior + 0.085 * anterior)


def _draw_shoulders(frame: Frame, rng: np.random.Generator) -> Plane:
    """Clavicles, shoulder blades and humeral heads."""
    outward = np.abs(frame.x)
    height = rng.uniform(0.135, 0.165)
    middle = height - 0.13 * outward + 0.012 * np.sin(14 * outward)
    clavicle = step(0.013 - np.abs(frame.y - middle), 0.004) * step(outward - 0.035, 0.01) * step(0.38 - outward, 0.01)
    blade = (
        step(outward - 0.355 - 0.12 * np.abs(frame.y - 0.3), 0.006)
        * step(frame.y - 0.14, 0.03)
        * step(0.47 - frame.y, 0.05)
    )
    arm = step(0.05 - np.hypot(outward - 0.45, frame.y - 0.16), 0.01)
    return 0.15 * clavicle + 0.09 * blade + 0.14 * arm


def _draw_vessels(frame: Frame, rng: np.random.Generator) -> Plane:
    """Branching vessels from the hila, thinner toward the periphery: (H, W)."""
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    pen = ImageDraw.Draw(canvas)
    for outward in OUTWARD.values():
        for angle in (-1.3, -0.9, -0.5, 0.0, 0.4, 0.75, 1.05, 1.3):
            root = (0.5 + outward * rng.uniform(0.06, 0.1), 0.44 + 0.035 * angle + rng.normal(0, 0.012))
            _draw_vessel(rng, pen, root, angle + rng.normal(0, 0.12), outward, width=0.0115)
    soft = canvas.filter(ImageFilter.BoxBlur(1)).resize(frame.hw[::-1], Image.Resampling.BICUBIC)
    return np.asarray(soft, np.float32) * np.float32(0.19 / 255)


def _draw_vessel(
    rng: np.random.Generator,
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    angle: float,
    outward: float,
    width: float,
) -> None:
    """Draw one vessel of short segments, which branches at random and becomes thinner."""
    while width > 0.003:
        length = 0.036
        end = (at[0] + outward * length * math.cos(angle), at[1] + length * math.sin(angle))
        pen.line(
            [tuple(CANVAS_PX * c for c in at), tuple(CANVAS_PX * c for c in end)],
            fill=round(255 * min(1.0, 0.15 + 70 * width)),
            width=max(1, round(CANVAS_PX * width)),
        )
        at, width, angle = end, width * 0.82, angle + rng.normal(0, 0.22)
        if rng.random() < 0.28:
            _draw_vessel(rng, pen, at, angle + rng.choice((-0.5, 0.5)), outward, width * 0.75)
