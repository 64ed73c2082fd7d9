"""Plots of an evaluation report, each an SVG in a data URI, so that the page is a single file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.common.plotting import BLUE, GRAY, GRID, INK, LINE, QUIET, VERMILION, encode_figure
from cclip_deploy.evaluation.bootstrap import Estimate
from cclip_deploy.evaluation.summary import CalibrationBin, ControlScore, ThresholdPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (3.3, 2.75)


def draw_controls(controls: Sequence[ControlScore], true: Estimate) -> str:
    """Plot Dice with interval for the true prompts and for every control that has rows."""
    figure, axes = _plot("Dice, mean over rows", "")
    named = [("true", true), *((c.name, c.dice) for c in controls if c.dice.value is not None)]
    for place, (name, estimate) in enumerate(reversed(named)):
        color = BLUE if name == "true" else GRAY
        value = np.nan if estimate.value is None else estimate.value
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [place, place], color=color, lw=3.2, solid_capstyle="butt")
        axes.plot([value], [place], "o", color="white", mec=color, mew=1.6, ms=5)
        if not np.isnan(value):
            axes.annotate(f"{value:.2f}", (value, place), (0, 5), textcoords="offset points", ha="center", color=color,
                          fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(named)), [name for name, _ in reversed(named)])
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.5, len(named) - 0.3))
    axes.grid(axis="y", visible=False)
    return _data_uri(figure)


def draw_curve(curve: Sequence[ThresholdPoint], threshold: float) -> str:
    """Plot mean and pooled Dice by threshold, with intervals as bands."""
    figure, axes = _plot("threshold on the probability", "Dice")
    x = [point.threshold for point in curve]
    for name, color, estimates in (
        ("mean over rows", BLUE, [point.dice_per_image for point in curve]),
        ("pooled", VERMILION, [point.dice_pooled for point in curve]),
    ):
        axes.plot(x, _values(estimates), color=color, lw=1.8, label=name)
        low, high = ([np.nan if v is None else v for v in side] for side in _interval_ends(estimates))
        axes.fill_between(x, low, high, color=color, alpha=0.14, lw=0)
    axes.axvline(threshold, color=QUIET, lw=0.9, ls=(0, (3, 3)))
    axes.annotate(
        f"used: {threshold:g}", (threshold, 0.02), (4, 0), textcoords="offset points", color=QUIET, fontsize=8.5
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.08), fontsize=8.5)
    return _data_uri(figure)


def draw_calibration(bins: Sequence[CalibrationBin]) -> str:
    """Plot a reliability diagram, with the number of pixels per bin below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="white")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    filled = [b for b in bins if b.pixels]
    axes.plot([0, 1], [0, 1], color=QUIET, lw=0.9, ls=(0, (3, 3)))
    axes.plot([b.mean_probability for b in filled], [b.inside_share for b in filled], "o-", color=BLUE, ms=4, lw=1.5)
    below.bar([(b.low + b.high) / 2 for b in bins], [b.pixels for b in bins], 0.9 / len(bins), color=GRAY)
    below.set_yscale("symlog", linthresh=1)
    most = max((b.pixels for b in bins), default=1)
    exponents = range(0, int(np.log10(max(most, 1))) + 1, 3)
    below.set_yticks([10**e for e in exponents], [f"$10^{{{e}}}$" for e in exponents], minor=False)
    below.yaxis.set_minor_locator(_no_ticks())
    below.set_ylim(0, 3 * max(most, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="fraction of pixels inside")
    below.set(xlabel="predicted probability", ylabel="pixels")
    for part in (axes, below):
        _style_axes(part)
    return _data_uri(figure)


def draw_dice_histogram(dice: Sequence[float], mean: Estimate) -> str:
    """Plot a histogram of the rows' Dice, with their mean."""
    figure, axes = _plot("Dice of a row", "rows")
    axes.hist(dice, bins=20, range=(0, 1), color=BLUE, alpha=0.75, rwidth=0.92)
    if mean.value is not None:
        axes.axvline(mean.value, color=VERMILION, lw=1.4)
        axes.annotate(f"mean {mean.value:.3f}", (mean.value, 1), (-5, -12), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right" if mean.value > 0.3 else "left", color=VERMILION,
                      fontsize=8.5)  # fmt: skip
    axes.set_xlim(0, 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _data_uri(figure)


def _plot(x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    _style_axes(axes)
    return figure, axes


def _style_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.xaxis.label.set(color=QUIET, fontsize=9)
    axes.yaxis.label.set(color=QUIET, fontsize=9)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _values(estimates: Sequence[Estimate]) -> list[float]:
    return [np.nan if estimate.value is None else estimate.value for estimate in estimates]


def _interval_ends(estimates: Sequence[Estimate]) -> tuple[list[float | None], list[float | None]]:
    return [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(encode_figure(figure, "svg")).decode()
