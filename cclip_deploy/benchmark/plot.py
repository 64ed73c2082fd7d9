"""Bar chart of a benchmark: latency for one image and one prompt, the bundle against the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cclip_deploy.common.plotting import BLUE, INK, LINE, QUIET, require_matplotlib, save_figure
from cclip_deploy.errors import DataError

STAGE, BASELINE = "image and prompt", "plain export"
TITLES = {
    "fused fp32": "cclip-deploy in ONNX Runtime, new prompt",
    "fused fp32, OpenVINO": "cclip-deploy in OpenVINO, new prompt",
    "cached prompt fp32": "cclip-deploy in ONNX Runtime, cached prompt",
    "cached prompt fp32, OpenVINO": "cclip-deploy in OpenVINO, cached prompt",
    "pytorch eager": "PyTorch, whole network",
    "pytorch eager, channels last": "PyTorch, whole network, channels last",
    "pytorch eager, causal path": "PyTorch, causal path",
    "pytorch eager, causal path, channels last": "PyTorch, causal path, channels last",
    "torch.compile": "torch.compile, causal path",
    "plain export": "plain export in ONNX Runtime",
    "plain export, onnxslim": "plain export after onnxslim",
    "plain export, OpenVINO": "plain export in OpenVINO",
    "plain export, OpenVINO defaults": "plain export in OpenVINO, defaults",
    "ov.convert_model": "OpenVINO's own conversion",
    "ov.convert_model, OpenVINO defaults": "OpenVINO's own conversion, defaults",
}


def draw_benchmark(result: Mapping[str, Any], path: Path) -> None:
    """Plot a result of `bench --peers --json`: a bar for each candidate, the slowest on top.

    The candidates are the bundle's FP32 graphs, with the prompt encoded and cached, and every baseline.

    Raises:
        DataError: the result has no plain export, or is not one of `--peers`.
        EnvironmentIssue: matplotlib is not installed.
    """
    require_matplotlib("A plot")
    from matplotlib.figure import Figure

    rows = _rows(result)
    figure = Figure(figsize=(10, 0.44 * len(rows) + 1.35), dpi=120, facecolor="white")
    axes = figure.add_axes((0.42, 0.02, 0.565, 1 - 1.0 / (0.44 * len(rows) + 1.35)))
    times = [row["p50_ms"] for row in rows]
    axes.barh(range(len(rows)), times, color=[BLUE if row.get("ours") else LINE for row in rows], height=0.74)
    ratios = {ratio["candidate"]: ratio["ratio"] for ratio in result["ratios"] if ratio["baseline"] == BASELINE}
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        style: dict[str, Any] = {"color": BLUE if row.get("ours") else INK, "fontsize": 10.5}
        style["fontweight"] = "bold" if row.get("ours") else "normal"
        label.set(**style)
        axes.annotate(
            _bar_text(row, ratios.get(row["name"])), (row["p50_ms"], place), (6, 0),
            textcoords="offset points", va="center", **style,
        )  # fmt: skip
    axes.set(xlim=(0, max(times) * 1.42), ylim=(-0.6, len(rows) - 0.4), xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(LINE)
    axes.tick_params(length=0)
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.36 / height, _title(result), color=INK, fontsize=13.5, fontweight="bold")
    figure.text(0.02, 1 - 0.66 / height, _subtitle(result), color=QUIET, fontsize=9.5)
    save_figure(figure, path)


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        whole = [row for row in result["results"] if row["stage"] == STAGE]
        rows = [row for row in whole if not row.get("ours") or row["precision"] == "fp32"]
        known = {row["name"] for row in rows} >= {BASELINE} and "network" in result
    except (KeyError, TypeError) as error:
        raise DataError(f"This is not a result of a benchmark: {error!r}. Make one: bench --peers --json") from error
    if not known:
        raise DataError(f"There is no {BASELINE} to compare with. Make a result with: bench --peers --json")
    return sorted(rows, key=lambda row: float(row["p50_ms"]))


def _label(row: Mapping[str, Any]) -> str:
    precision = "" if row["precision"] == "fp32" else f" ({row['precision'].upper()})"
    return f"{TITLES.get(row['name'], row['name'])}{precision}"


def _bar_text(row: Mapping[str, Any], ratio: float | None) -> str:
    """Format the time, the ratio to the baseline and, unless in FP32, the Dice against the FP32 masks."""
    time_ms = row["p50_ms"]
    text = f"{time_ms:,.0f} ms" if time_ms >= 20 else f"{time_ms:.1f} ms"
    if ratio is None:
        return f"{text}  ·  the baseline, 1 ×"
    dice = "" if row["precision"] == "fp32" or row.get("mask_dice") is None else f"  ·  Dice {row['mask_dice']:.3f}"
    return f"{text}  ·  {ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f} ×{dice}"


def _title(result: Mapping[str, Any]) -> str:
    height, width = result["network"]["image_hw"]
    network = f"{result['network']['name']}, {height}×{width}"
    return f"One image, one prompt: milliseconds on {result['threads']} CPU threads ({network})"


def _subtitle(result: Mapping[str, Any]) -> str:
    cpu = result["fingerprint"]["cpu"]["model"].replace("(R)", "").replace("(TM)", "")
    count = min(row["n"] for row in result["results"])
    runs = f"FP32 unless a bar names another precision, median of {count} interleaved rounds"
    return f"{cpu} · {runs} · × = times as fast as the plain export"
