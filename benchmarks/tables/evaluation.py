"""Tables of docs/evaluation.md, from the `evaluation.json` that `cclip-deploy evaluate -o` writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables.coverage import coverage_tables
from benchmarks.tables.markers import Page
from benchmarks.tables.sources import Measurements, markdown, with_interval

FILE = "evaluation_tiny.json"
SCORES = {
    "dice_per_image": ("Dice, mean over rows", 3),
    "iou_per_image": ("IoU, mean over rows", 3),
    "dice_pooled": ("Dice, pooled over all pixels", 3),
    "iou_pooled": ("IoU, pooled over all pixels", 3),
    "hd95_px": ("HD95, pixels", 2),
    "boundary_dice": ("boundary Dice", 3),
    "expected_calibration_error": ("expected calibration error", 4),
    "brier": ("Brier score", 4),
    "empty_found_empty": ("empty references predicted empty", 3),
}


def scores(measurements: Measurements) -> str:
    """Render every metric with its interval and its number of rows."""
    result = measurements.read(FILE)
    data, tolerance = result["data"], result["policy"]["boundary_tolerance_px"]
    rows = []
    for key, (title, digits) in SCORES.items():
        title = f"{title} within {tolerance:g} pixels" if key == "boundary_dice" else title
        rows.append((title, estimate(result["scores"][key], digits), str(result["scores"][key]["rows"])))
    images = f"{data['images']} {data['split']} images"
    return markdown((f"score, {data['rows']} prompts on {images}", "value [95 % interval]", "rows"), rows)


def controls(measurements: Measurements) -> str:
    """Render every prompt control against the true prompts of the same rows."""
    shown = ("true_dice", "dice", "difference")
    rows = [
        (control["name"], str(control["dice"]["rows"]), *(estimate(control[key]) for key in shown))
        for control in measurements.read(FILE)["controls"]
    ]
    return markdown(("prompt", "rows", "Dice, true prompt", "Dice, this prompt", "paired difference"), rows)


def coverage(part: int) -> Callable[[Measurements], str]:
    """Render one table of simulated coverage: of patients, rounds or seeds."""
    return lambda measurements: coverage_tables(measurements.read("interval_coverage.json")).strip().split("\n\n")[part]


def estimate(found: dict[str, Any], digits: int = 3) -> str:
    """Return `0.826 [0.806, 0.845]` for an estimate of `evaluation.json`."""
    return with_interval(found["value"], found["low"], found["high"], digits=digits)


PAGE = Page(
    "docs/evaluation.md",
    {
        "evaluation scores": scores,
        "evaluation controls": controls,
        "coverage of patients": coverage(0),
        "coverage of rounds": coverage(1),
        "coverage of seeds": coverage(2),
    },
    {},
)
