"""Tables and values of docs/performance.md, from `cclip-deploy bench --peers` and benchmarks/multiply_adds.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables.markers import Page, Renderer
from benchmarks.tables.sources import Measurements, NotMeasured, markdown, shown, with_interval
from cclip_deploy.benchmark.plot import TITLES

SMALL, LARGE, COUNTS = "rn101_224x224.json", "rn101_416x416.json", "multiply_adds_rn101.json"
PLAIN, EAGER, WHOLE = "plain export", "pytorch eager", "image and prompt"
BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
UNITS = {"×": (1.0, " ×"), "%": (1.0, " %"), "": (1e-9, " G"), "B": (1e-9, " GB"), "s": (1.0, " s"), "ms": (1.0, " ms")}
DEFAULTS = "OpenVINO defaults"
WORKLOAD = re.compile(r"(?P<workload>\d+ [a-z ]*prompts? on .*?images?),? (?P<measure>time per|against) (?P<of>.*)")
AGAINST = {
    "the plain export": "the plain export",
    "PyTorch eager, whole network": "PyTorch eager",
    "OpenVINO with its defaults": DEFAULTS,
}
"""Names of the baselines in the figures of many prompts, and in their table."""


@dataclass(frozen=True)
class Bench:
    """One result of `cclip-deploy bench --peers --json`."""

    result: Mapping[str, Any]

    @staticmethod
    def read(measurements: Measurements, file: str) -> Bench:
        return Bench(measurements.read(file))

    def candidates(self, stage: str) -> list[Mapping[str, Any]]:
        """Return the results of one stage, the fastest last."""
        found = [row for row in self.result["results"] if row["stage"] == stage]
        return sorted(found, key=lambda row: -float(row["p50_ms"]))

    def p50_ms(self, name: str) -> float:
        """Return the median time of a candidate; raise NotMeasured if there is none of this name."""
        for row in self.result["results"]:
            if row["name"] == name:
                return float(row["p50_ms"])
        raise NotMeasured(f"Not measured yet: no candidate '{name}'.")

    def ratio(self, baseline: str, candidate: str) -> str:
        """Return `3.42 × [2.95, 3.54]`, baseline time / candidate time; 1 × for itself, else a dash."""
        if baseline == candidate:
            return "1 ×"
        try:
            row = self.paired(baseline, candidate)
        except NotMeasured:
            return "–"
        return with_interval(row["ratio"], row["low"], row["high"], " ×")

    def paired(self, baseline: str, candidate: str) -> Mapping[str, Any]:
        """Return the paired ratio, baseline time / candidate time, with its interval; raise NotMeasured if missing."""
        for row in self.result["ratios"]:
            if (row["baseline"], row["candidate"]) == (baseline, candidate):
                found: Mapping[str, Any] = row
                return found
        raise NotMeasured(f"Not measured yet: '{candidate}' was not compared with '{baseline}'.")

    def figure(self, what: str, backend: str) -> str:
        """Return an FP32 figure with its interval, bold if it reaches its target; a dash if missing."""
        for row in self.result["figures"]:
            of_fp32 = row["backend"] in (backend, None) and row.get("precision") in ("fp32", None)
            if of_fp32 and _plain_name(row["what"]) == what:
                return f"**{_figure(row)}**" if row["met"] else _figure(row)
        return "–"

    def fastest(self, matches: Callable[[str], bool]) -> str | None:
        """Return the name of the fastest matching candidate of the whole network; None if there is none."""
        found = [str(row["name"]) for row in self.candidates(WHOLE) if matches(row["name"])]
        return found[-1] if found else None

    def eager(self) -> str:
        """Return the name of PyTorch eager, whole network, in its faster memory format."""
        return self.fastest(lambda name: name in (EAGER, f"{EAGER}, channels last")) or EAGER


def _accuracy(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the relative error of the logits and the mean Dice against PyTorch; a dash if not measured."""
    error, dice = row.get("relative_error"), row.get("mask_dice")
    return f"{error:.1e}" if error else "–", "–" if dice is None else f"{dice:.4f}"


def _figure(row: Mapping[str, Any]) -> str:
    scale, unit = UNITS[row["unit"]]
    value, low, high = (None if row[key] is None else row[key] * scale for key in ("value", "low", "high"))
    return with_interval(value, low, high, unit)


def one_image(file: str, baselines: Sequence[str] = ()) -> Renderer:
    """Return a renderer for one image and one prompt: baselines, new prompt, cached prompt; slowest first.

    `baselines` selects some of them; all unless given.
    """

    def render(measurements: Measurements) -> str:
        bench = Bench.read(measurements, file)
        compared = {"the plain export": PLAIN, "PyTorch eager": bench.eager()}
        default = bench.fastest(lambda name: name.endswith(DEFAULTS))
        if default is not None:
            compared[DEFAULTS] = default
        rows = []
        for row in sorted(bench.candidates(WHOLE), key=_group):
            if row.get("ours") or not baselines or row["name"] in (*baselines, default):
                speed = (bench.ratio(baseline, row["name"]) for baseline in compared.values())
                rows.append((title_of(row), shown(row["p50_ms"]), *speed, *_accuracy(row)))
        against = [f"against {name}" for name in compared]
        columns = (WHOLE, "median, ms", *against, "relative error", "mask Dice")
        return markdown(columns, rows, right=(1,))

    return render


def many_prompts(file: str, starts: str = "") -> Renderer:
    """Return a renderer for many prompts, with a row for each workload, backend and precision.

    `starts` is how the names of the shown workloads begin: `128 `.
    """

    def render(measurements: Measurements) -> str:
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in measurements.read(file)["figures"]:
            found = WORKLOAD.fullmatch(_plain_name(row["what"]))
            if found and found["workload"].startswith(starts):
                ran = f"{BACKENDS[row['backend']]}, {row.get('precision', 'fp32')}"
                of = next((name for key, name in AGAINST.items() if found["of"].startswith(key)), "time")
                cells.setdefault((found["workload"], ran), {})[of] = _figure(row)
        columns = [name for name in ("time", *AGAINST.values()) if any(name in row for row in cells.values())]
        titles = ["time per prompt and image" if name == "time" else f"against {name}" for name in columns]
        rows = [(*key, *(row.get(name, "–") for name in columns)) for key, row in cells.items()]
        return markdown(("workload", "cclip-deploy in", *titles), rows)

    return render


def goals(measurements: Measurements) -> str:
    """Render every figure with a target, at both image sizes on both backends; bold if it is reached."""
    benches = [Bench.read(measurements, file) for file in (SMALL, LARGE)]
    figures = benches[0].result["figures"]
    goal_of = {_plain_name(row["what"]): _goal(row) for row in figures if row["goal"] is not None}
    rows = []
    for name, goal in goal_of.items():
        first, *cells = _figure_row(name, benches)
        rows.append((first, goal, *cells))
    columns = [f"{side}, {runtime}" for side in (224, 416) for runtime in BACKENDS.values()]
    return markdown(("figure", "target", *columns), rows)


def missed_targets(measurements: Measurements) -> str:
    """Render the targets that FP32 graphs in ONNX Runtime miss at 224×224."""
    figures = [row for row in measurements.read(SMALL)["figures"] if row["backend"] in ("onnxruntime", None)]
    missed = [(_plain_name(row["what"]), _goal(row), _figure(row)) for row in figures if row["met"] is False]
    return markdown(("missed target", "target", "measured"), missed) if missed else "Every target is reached."


def multiply_adds(measurements: Measurements) -> str:
    """Render the multiply-adds of the published network, of the plain export, and of each graph of a bundle."""
    found = measurements.read(COUNTS)
    graphs = found["graphs"]
    rows = [
        ("whole published network, one image and one prompt", found["published"]),
        ("its causal path in the published order of operations (`export --plain`)", found["plain"]),
        ("`image_encoder`, once per image", graphs["image_encoder"]),
        ("`prompt_encoder`, once per prompt, then cached (`--prompt-cache`: on disk)", graphs["prompt_encoder"]),
        ("`mask_decoder`, for each prompt on each image", graphs["mask_decoder"]),
    ]
    return markdown(("what runs", "multiply-adds"), [(what, shown(count / 1e9, " G")) for what, count in rows])


def bound(*graphs: str) -> Renderer:
    """Return a renderer of the plain export's multiply-adds over those of some graphs."""

    def render(measurements: Measurements) -> str:
        found = measurements.read(COUNTS)
        return shown(found["plain"] / sum(found["graphs"][graph] for graph in graphs))

    return render


def plain_efficiency(measurements: Measurements) -> str:
    """Render the fraction of the measured sgemm peak, in percent, at which the plain export runs in ONNX Runtime."""
    bench = Bench.read(measurements, SMALL)
    peak = bench.result["peak"]["multiply_adds_per_second"]
    seconds = bench.p50_ms(PLAIN) / 1e3
    return f"{100 * measurements.read(COUNTS)['plain'] / seconds / peak:.0f}"


def machine(measurements: Measurements) -> str:
    """Render the machine of the run at 224×224."""
    result = measurements.read(SMALL)
    name = " ".join(result["fingerprint"]["cpu"]["model"].replace("(R)", "").split())
    return f"{result['threads']} threads of an {name}"


def rounds(measurements: Measurements) -> str:
    """Render the rounds of both runs: `8 at 224×224 and 3 at 416×416`."""
    counts = [max(row["n"] for row in measurements.read(file)["results"]) for file in (SMALL, LARGE)]
    return f"{counts[0]} at 224×224 and {counts[1]} at 416×416"


def title_of(row: Mapping[str, Any]) -> str:
    """Return `cclip-deploy, new prompt: OpenVINO, fp32`, or a baseline's title and precision."""
    if not row.get("ours"):
        return f"{TITLES.get(row['name'], row['name'])}, {row['precision']}"
    prompt = "cached prompt" if row["name"].startswith("cached") else "new prompt"
    return f"**cclip-deploy, {prompt}**: {BACKENDS[row['backend']]}, {row['precision']}"


def _goal(row: Mapping[str, Any]) -> str:
    scale, unit = UNITS[row["unit"]]
    return f"{'≥' if row['at_least'] else '≤'} {row['goal'] * scale:g}{unit}"


def _group(row: Mapping[str, Any]) -> int:
    return 0 if not row.get("ours") else 2 if row["name"].startswith("cached") else 1


def _plain_name(what: str) -> str:
    """Return the name of a figure without the name of its baseline in this run."""
    return re.sub(r" \([^()]*\)$|, channels last$", "", what)


def _figure_row(name: str, benches: Sequence[Bench]) -> tuple[str, ...]:
    return name, *(bench.figure(name, backend) for bench in benches for backend in BACKENDS)


PAGE = Page(
    "docs/performance.md",
    {
        "speed 224": one_image(SMALL),
        "speed 416": one_image(LARGE),
        "many prompts 224": many_prompts(SMALL),
        "goals": goals,
    },
    {
        "machine": machine,
        "rounds": rounds,
        "bound cached": bound("image_encoder", "mask_decoder"),
        "bound new": bound("fused"),
        "plain efficiency": plain_efficiency,
    },
)
