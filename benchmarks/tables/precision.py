"""Tables of docs/precision.md: results of engines/precision_table.py, tune-precision and calibration_curve.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables.markers import Page
from benchmarks.tables.performance import BACKENDS, PLAIN, SMALL, Bench
from benchmarks.tables.sources import Measurements, markdown, with_interval

TINY, RN101 = "precision_tiny.json", "precision_rn101.json"
TUNED = {"int8": "tiny_int8.toml", "fp8": "tiny_fp8.toml"}
CURVE = "calibration_curve_tiny.json"
USES = {
    "fp16": ("`--fp16`", "the default on any GPU; no calibration"),
    "bf16": ("`--bf16`", "if FP16 overflows (the build fails and names the layer)"),
    "int8": ("`--int8`, rest FP32", "CPUs with OpenVINO; the smallest image engine"),
    "int8-fp16": ("`--int8 --fp16`, rest FP16", "GPUs, if FP16 is too slow or too large"),
    "fp8": ("`--fp8`, rest FP32", "Ada and later, as an alternative to INT8; only with a tuned profile"),
}
METHODS = {"min-max": "min-max", "entropy": "entropy", "percentile": "percentile 99.99 (the default)"}


def choice(measurements: Measurements) -> str:
    """Render the use of each precision, and its masks on the trained tiny network."""
    by_name = {row["precision"]: row for row in measurements.read(TINY)["rows"]}
    rows = []
    for name, (option, purpose) in USES.items():
        rows.append((option, purpose, _dice(by_name[name]["masks"])))
        if name in TUNED:
            tuned = measurements.read(TUNED[name])["tuned"]
            kept = len(measurements.read(TUNED[name])["keep"])
            purpose = f"as above, {kept} of {len(tuned['damage'])} blocks in FP32"
            rows.append((f"`--{name}` with the tuned profile", purpose, _dice(tuned["held_out"])))
    return markdown(("precision", "use", "mean Dice to FP32 / worst image"), rows)


def costs(file: str) -> Any:
    """Return a renderer of one network's engines: layers, sizes, build time and masks by precision."""

    def render(measurements: Measurements) -> str:
        rows = []
        for row in measurements.read(file)["rows"]:
            layers = ", ".join(f"{count} {kind}" for kind, count in row["layers"].items())
            megabytes = _pair({name: size / 1e6 for name, size in row["engine_bytes"].items()})
            peak, error = f"{row['peak_bytes'] / 1e9:.1f}", f"{row['features_error']:.2g}"
            seconds = _pair(row["build_seconds"])
            rows.append((row["precision"], layers, megabytes, seconds, peak, _dice(row["masks"]), error))
        columns = (
            "precision", "layers of the image engine", "image + prompt engine, MB", "build, s", "peak, GB",
            "mask Dice, mean / worst image", "error of the features",
        )  # fmt: skip
        return markdown(columns, rows, right=(2, 3, 4))

    return render


def goals(measurements: Measurements) -> str:
    """Render the targets of the precisions and whether they are reached."""
    rows = [*_mask_goals(measurements), *_engine_goals(measurements), _speed_goal(measurements)]
    columns = ("figure", "target", "measured", "met")
    return markdown(columns, [(*row[:3], "yes" if row[3] else "**no**") for row in rows])


def front(precision: str) -> Any:
    """Return a renderer of the Pareto front of tune-precision on the trained tiny network."""

    def render(measurements: Measurements) -> str:
        profile = measurements.read(TUNED[precision])
        rows, before = [], list[str]()
        for point in profile["tuned"]["front"]:
            added = ", ".join(block for block in point["kept"] if block not in before) or "none"
            label = f"… and {added}" if before else added
            label += " (**chosen**)" if set(point["kept"]) == set(profile["keep"]) else ""
            held_out = point["held_out"]
            rows.append((label, f"{100 * point['share']:.1f} %", f"{held_out['mean']:.4f}", f"{held_out['worst']:.4f}"))
            before = point["kept"]
        columns = ("blocks in FP32", f"fraction in {precision.upper()}", "held-out mean Dice", "worst image")
        return markdown(columns, rows, right=(1, 2, 3))

    return render


def curve(measurements: Measurements) -> str:
    """Render the mean Dice against FP32 by method and number of calibration images."""
    points = measurements.read(CURVE)
    counts = sorted({point["calibration_pictures"] for point in points})
    by = {(point["method"], point["calibration_pictures"]): point["mean"] for point in points}
    rows = [(title, *(f"{by[method, count]:.4f}" for count in counts)) for method, title in METHODS.items()]
    return markdown(("mean Dice at", *map(str, counts)), rows)


def _mask_goals(measurements: Measurements) -> Sequence[tuple[str, str, str, bool]]:
    rows = []
    for network, file in (("tiny, trained", TINY), ("rn101, random weights", RN101)):
        mean = _row(measurements, file, "fp16")["masks"]["mean"]
        rows.append((f"FP16 mask Dice to FP32, mean, {network}", "≥ 0.999", f"{mean:.4f}", mean >= 0.999))
    tuned = measurements.read(TUNED["int8"])["tuned"]["held_out"]
    met = tuned["mean"] >= 0.99 and tuned["worst"] >= 0.95
    return [*rows, ("INT8, tuned, mean / worst Dice, tiny, held-out", "≥ 0.99 / ≥ 0.95", _dice(tuned), met)]


def _engine_goals(measurements: Measurements) -> Sequence[tuple[str, str, str, bool]]:
    fp16, int8, mixed = (_row(measurements, RN101, name) for name in ("fp16", "int8", "int8-fp16"))
    image_mb = [_megabytes(row, "image_encoder") for row in (fp16, int8)]
    both_mb = [_megabytes(row, "image_encoder", "prompt_encoder") for row in (fp16, mixed)]
    seconds, peak_gb = fp16["build_seconds"]["image_encoder"], fp16["peak_bytes"] / 1e9
    return [
        (
            "rn101 image engine, FP16 / INT8", "≤ 195 / ≤ 110 MB", f"{image_mb[0]:.1f} / {image_mb[1]:.1f} MB",
            image_mb[0] <= 195 and image_mb[1] <= 110,
        ),
        (
            "rn101 image + prompt engines, FP16 / INT8 with FP16 rest", "≤ 320 / ≤ 235 MB",
            f"{both_mb[0]:.1f} / {both_mb[1]:.1f} MB", both_mb[0] <= 320 and both_mb[1] <= 235,
        ),
        (
            "TensorRT-RTX build of rn101's FP16 image engine; memory of the whole command", "≤ 10 s, ≤ 2 GB",
            f"{seconds:.1f} s, {peak_gb:.1f} GB", seconds <= 10 and peak_gb <= 2,
        ),
    ]  # fmt: skip


def _speed_goal(measurements: Measurements) -> tuple[str, str, str, bool]:
    ratio = Bench.read(measurements, SMALL).paired(PLAIN, f"cached prompt int8, {BACKENDS['openvino']}")
    text = with_interval(ratio["ratio"], ratio["low"], ratio["high"], " ×")
    what = "INT8 in OpenVINO, one image and a cached prompt, against the plain export in ONNX Runtime"
    return what, "≥ 7 ×", text, ratio["ratio"] >= 7


def _row(measurements: Measurements, file: str, precision: str) -> Mapping[str, Any]:
    return next(row for row in measurements.read(file)["rows"] if row["precision"] == precision)


def _megabytes(row: Mapping[str, Any], *graphs: str) -> float:
    return float(sum(row["engine_bytes"][graph] for graph in graphs)) / 1e6


def _pair(by_graph: Mapping[str, float]) -> str:
    return " + ".join(f"{by_graph[graph]:.1f}" for graph in ("image_encoder", "prompt_encoder"))


def _dice(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.4f} / {found['worst']:.4f}"


PAGE = Page(
    "docs/precision.md",
    {
        "precision choice": choice,
        "precision tiny": costs(TINY),
        "precision rn101": costs(RN101),
        "precision goals": goals,
        "front int8": front("int8"),
        "front fp8": front("fp8"),
        "calibration curve": curve,
    },
    {},
)
