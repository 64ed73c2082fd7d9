"""Draw a result of `bench --peers --json`: milliseconds for one picture and one prompt, ours against the peers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, PEER, INK, QUIET = "#0072B2", "#C9CDD2", "#1B1F24", "#6A737D"  # Okabe and Ito's blue; greys differ in lightness
WHOLE, REFERENCE = "image and prompt", "plain export"
TITLES = {
    "cached prompt fp32": "cclip-deploy, ONNX Runtime", "cached prompt fp32, OpenVINO": "cclip-deploy, OpenVINO",
    "pytorch eager": "PyTorch eager, whole network", "pytorch eager, causal path": "PyTorch eager, causal path",
    "plain export": "plain export, ONNX Runtime", "plain export, onnxslim": "plain export, onnxslim, ONNX Runtime",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures/benchmark.png"))
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    rows = [r for r in result["results"] if r["stage"] == WHOLE and not r["name"].startswith("fused")]
    rows.sort(key=lambda row: float(row["p50_ms"]), reverse=True)
    times = [row["p50_ms"] for row in rows]
    ratios = {r["candidate"]: r["ratio"] for r in result["ratios"] if r["baseline"] == REFERENCE} | {REFERENCE: 1.0}
    colours = [OURS if row.get("ours") else PEER for row in rows]
    name, (height, width) = result["network"]["name"], result["network"]["image_hw"]

    figure, axes = plt.subplots(figsize=(9, 0.46 * len(rows) + 1.5), dpi=110, facecolor="white", layout="constrained")
    axes.barh(range(len(rows)), times, color=colours, height=0.72)
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        weight = "bold" if row.get("ours") else "normal"
        said = (
            f" {time:,.0f} ms   {ratios[row['name']]:.2g} ×"
            if time >= 10
            else f" {time:.1f} ms   {ratios[row['name']]:.2g} ×"
        )
        axes.text(time, place, said, va="center", color=INK, weight=weight)
    axes.set_yticks(range(len(rows)), [TITLES.get(row["name"], row["name"]) for row in rows], color=INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_weight("bold" if row.get("ours") else "normal")
    axes.set(xlim=(0, max(times) * 1.22), xticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    cpu = result["fingerprint"]["cpu"]["model"]
    figure.suptitle(
        f"One picture, one prompt: {name}, {height}×{width}, FP32", x=0.01, ha="left", weight="bold", color=INK
    )
    axes.set_title(
        f"median ms, × faster than the plain export; {cpu}, {result['threads']} threads",
        loc="left",
        size=9,
        color=QUIET,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, metadata={"Software": None})
    print(f"drawn: {arguments.output}")


if __name__ == "__main__":
    main()
