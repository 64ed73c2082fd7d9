"""Plot an explanation: mask, causal masks and confounding features over the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.plotting import INK, QUIET, save_figure
from cclip_deploy.inference.explain import Seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float32]
COLUMNS, PANEL_INCHES, DPI = 3, 3.7, 110
COLOR_MAP = "viridis"
LONGEST_TITLE = 110


@dataclass(frozen=True)
class Panel:
    """A map (h, w) to draw over the image, its title, and its color range."""

    values: Floats
    title: str
    below: str
    unit: str
    limits: tuple[float, float]


def write_explanation(
    path: Path, pixels: Floats, mask: NDArray[np.bool_], prompt: str, seen: Seen, answer: Floats | None
) -> Path:
    """Write the plot as PNG, atomically, and return its path; raise EnvironmentIssue if that fails.

    Args:
        path: of the PNG file.
        pixels: the image, (H, W) or (H, W, 3) in [0, 1].
        mask: the segmentation, (H, W).
        prompt: title of the plot.
        seen: the maps, (h, w) each.
        answer: the confounding branch's probability (H, W), if there is one.
    """
    figure = _draw(pixels, mask, prompt, _panels(seen, answer))
    save_figure(figure, path, DPI)
    return path


def _panels(seen: Seen, answer: Floats | None) -> list[Panel]:
    """Return the panels; all causal masks have the same color range."""
    panels = []
    if seen.masks:
        limits = min(float(m.min()) for m in seen.masks.values()), max(float(m.max()) for m in seen.masks.values())
        for name, values in seen.masks.items():
            panels.append(Panel(values, f"Causal mask {name}", _range(values), "mean over channels", limits))
    if seen.confounding is not None:
        values = seen.confounding
        limits = float(values.min()), float(values.max())
        panels.append(Panel(values, "Confounding features", _range(values), "mean over channels", limits))
    if answer is not None:
        panels.append(Panel(answer, "Prediction of the confounding branch", _range(answer), "probability", (0.0, 1.0)))
    return panels


def _range(values: Floats) -> str:
    return f"{values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}"


def _draw(pixels: Floats, mask: NDArray[np.bool_], prompt: str, panels: list[Panel]) -> Figure:
    from matplotlib.figure import Figure

    rows = -(-(len(panels) + 1) // COLUMNS)
    height, width = pixels.shape[:2]
    panel_height = PANEL_INCHES * min(max(height / width, 0.5), 1.6)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES, rows * (0.84 * panel_height + 0.62) + 0.4), layout="constrained")
    figure.set_facecolor("white")
    figure.suptitle(_shorten(prompt), color=INK, fontsize=12, parse_math=False)
    every = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in every:
        axes.set_axis_off()
    _draw_image(every[0], pixels)
    if mask.any():
        every[0].contour(mask, levels=[0.5], colors=["#38C7D6"], linewidths=1.6)
    _title(every[0], "Prediction of the causal branch", f"{mask.mean():.1%} of the image")
    for axes, panel in zip(every[1:], panels, strict=False):
        _draw_image(axes, pixels)
        drawn = axes.imshow(
            panel.values, cmap=COLOR_MAP, vmin=panel.limits[0], vmax=max(panel.limits[1], panel.limits[0] + 1e-6),
            alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear",
        )  # fmt: skip
        bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
        _style_bar(bar, panel.unit)
        _title(axes, panel.title, panel.below)
    return figure


def _draw_image(axes: Any, pixels: Floats) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")


def _title(axes: Any, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", fontsize=10.5, color=INK, loc="left")
    axes.text(0, 1.015, below, transform=axes.transAxes, fontsize=9, color=QUIET, va="bottom")


def _style_bar(bar: Any, unit: str) -> None:
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5, colors=INK)
    bar.set_label(unit, fontsize=8.5, color=QUIET)


def _shorten(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return printable if len(printable) <= LONGEST_TITLE else printable[: LONGEST_TITLE - 1] + "…"
