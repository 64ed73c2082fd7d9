"""Tables and values of README.md: the demo's report, and the benchmark at 224×224."""

from __future__ import annotations

from benchmarks.tables.markers import Page, Renderer
from benchmarks.tables.performance import (
    EAGER,
    PLAIN,
    SMALL,
    Bench,
    many_prompts,
    missed_targets,
    multiply_adds,
    one_image,
)
from benchmarks.tables.sources import Measurements, markdown, shown

DEMO = "demo.json"
WORDINGS = {" films": " images", "precision proved": "precision verified", "clearly less": "at least 0.1 less"}
"""Wordings of stored reports and those that the demo prints now."""
MET = {True: "yes", False: "**no**", None: ""}
BASELINES = (
    EAGER, f"{EAGER}, channels last", f"{EAGER}, causal path", f"{EAGER}, causal path, channels last",
    PLAIN, f"{PLAIN}, OpenVINO", f"{PLAIN}, OpenVINO defaults",
)  # fmt: skip


def demo(measurements: Measurements) -> str:
    """Render the table of `make demo` and its total time."""
    report = measurements.read(DEMO)
    rows = [
        (row["stage"], _reworded(row["what"]), row["value"], _reworded(row["goal"]), MET[row["met"]])
        for row in report["rows"]
    ]
    rows.append(("demo", "all stages", f"{report['total_seconds']:.0f} s", "", ""))
    return markdown(("stage", "what", "value", "target", "met"), rows)


def _reworded(text: str) -> str:
    for stored, shown_now in WORDINGS.items():
        text = text.replace(stored, shown_now)
    return text


def against_plain(candidate: str) -> Renderer:
    """Return a renderer of the paired ratio to the plain export, without its interval."""
    return lambda measurements: shown(Bench.read(measurements, SMALL).paired(PLAIN, candidate)["ratio"])


def against_eager(candidate: str) -> Renderer:
    """Return a renderer of the paired ratio to PyTorch eager, whole network, in its faster memory format."""

    def render(measurements: Measurements) -> str:
        bench = Bench.read(measurements, SMALL)
        return shown(bench.paired(bench.eager(), candidate)["ratio"])

    return render


PAGE = Page(
    "README.md",
    {
        "demo": demo,
        "multiply-adds": multiply_adds,
        "speed": one_image(SMALL, BASELINES),
        "many prompts": many_prompts(SMALL, "128 "),
        "missed targets": missed_targets,
    },
    {
        "new prompt, plain export": against_plain("fused fp32"),
        "new prompt, eager": against_eager("fused fp32"),
        "cached prompt, plain export": against_plain("cached prompt fp32"),
        "cached prompt, eager": against_eager("cached prompt fp32"),
    },
)
