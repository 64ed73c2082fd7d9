"""The front of a sensitivity search as a picture: share of multiply-adds in low precision against Dice."""

from __future__ import annotations

from pathlib import Path

from cclip_deploy.common.plotting import BLUE, INK, QUIET, VERMILION, require_matplotlib, save_figure
from cclip_deploy.errors import UsageError
from cclip_deploy.quantization.profile import TunedProfile

FORMATS = (".png", ".svg")


def draw_pareto_front(profile: TunedProfile, path: Path) -> None:
    """Write a PNG or SVG: Dice on the held-out pictures, mean and worst, of every form that was judged.

    Raises:
        UsageError: another ending than .png or .svg.
        EnvironmentIssue: matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in none of {', '.join(FORMATS)}.")
    require_matplotlib("A plot")
    from matplotlib.figure import Figure

    tuned = profile.tuned
    points = sorted(tuned.front, key=lambda point: point.share)
    shares = [100 * point.share for point in points]
    figure = Figure(figsize=(8, 4.2), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for name, color in (("mean", BLUE), ("worst", VERMILION)):
        label = "mean" if name == "mean" else "worst picture"
        axes.plot(shares, [getattr(p.held_out, name) for p in points], "o-", color=color, label=label, markersize=5)
        axes.axhline(getattr(tuned.budget, name), color=color, linestyle=":", linewidth=1.2)
        axes.plot(100 * tuned.share, getattr(tuned.held_out, name), "o", color=color, markersize=12, fillstyle="none")
    axes.annotate(
        f"chosen: {tuned.share:.0%}, {tuned.held_out.mean:.4f}", (100 * tuned.share, tuned.held_out.mean), (-14, -24),
        textcoords="offset points", color=INK, fontweight="bold", ha="right",
    )  # fmt: skip
    low = profile.precision.product_type.upper()
    axes.set_xlabel(f"multiply-adds of the image encoder in {low}, %", color=QUIET)
    axes.set_ylabel(f"Dice to FP32's masks, {len(tuned.held_out_pictures)} held-out pictures", color=QUIET)
    axes.set_title(f"{profile.precision}: what each share costs (dotted: the budget)", color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower left")
    save_figure(figure, path)
