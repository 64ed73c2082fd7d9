"""Tests of the bar chart of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.benchmark.plot import LINE, draw_benchmark
from cclip_deploy.common.plotting import BLUE
from cclip_deploy.errors import DataError

TIMES_MS = {"pytorch eager": 800.0, "plain export": 400.0, "fused fp32": 100.0, "cached prompt fp32": 90.0}


def result(**changes: object) -> dict[str, Any]:
    rows = [
        {"name": name, "stage": "image and prompt", "precision": "fp32", "p50_ms": ms, "n": 9, "ours": "fp32" in name}
        for name, ms in TIMES_MS.items()
    ]
    ratios = [
        {"baseline": "plain export", "candidate": name, "ratio": 400 / ms}
        for name, ms in TIMES_MS.items()
        if name != "plain export"
    ]
    facts = {"network": {"name": "tiny", "image_hw": [64, 96]}, "fingerprint": {"cpu": {"model": "Some CPU"}}}
    return {"results": rows, "ratios": ratios, "threads": 2, **facts, **changes}


def longest_run(picture: np.ndarray, color: str) -> int:
    """Return the longest horizontal run of pixels of a color, which is the longest bar."""
    wanted = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])
    rows = ["".join("x" if hit else " " for hit in row) for row in (picture == wanted).all(axis=2)]
    return max(len(run) for row in rows for run in row.split(" "))


def test_bars_are_as_long_as_the_times_on_a_white_ground(tmp_path: Path) -> None:
    draw_benchmark(result(), tmp_path / "new" / "b.png")
    with Image.open(tmp_path / "new" / "b.png") as opened:
        picture = np.asarray(opened.convert("RGB"))
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert longest_run(picture, LINE) / longest_run(picture, BLUE) == pytest.approx(8, rel=0.05)  # 800 ms to 100 ms


def test_results_of_earlier_versions_are_plotted(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "docs" / "measurements" / "rn101_416x416.json"
    told = json.loads(kept.read_text())
    for row in told["results"]:  # as earlier versions wrote it
        for key in ("role", "form", "setting", "mask_dice", "samples_ms"):
            row.pop(key, None)
    draw_benchmark(told, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_other_precisions_than_fp32_are_labeled_with_their_dice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib.figure import Figure

    def keep(self: Figure, *_: object, **__: object) -> None:
        axes = self.axes[0]
        texts.update(label.get_text() for label in (*axes.texts, *axes.get_yticklabels()))

    texts: set[str] = set()
    monkeypatch.setattr(Figure, "savefig", keep)
    told = result()
    row = {"name": "plain export, OpenVINO defaults", "stage": "image and prompt", "precision": "bf16", "n": 9}
    told["results"].append({**row, "p50_ms": 200.0, "mask_dice": 0.9914, "ours": False})
    told["results"].append({**row, "name": "cached prompt int8", "precision": "int8", "p50_ms": 40.0, "ours": True})
    told["ratios"].append({"baseline": "plain export", "candidate": row["name"], "ratio": 2.0})
    draw_benchmark(told, tmp_path / "b.png")
    assert "plain export in OpenVINO, defaults (BF16)" in texts
    assert "200 ms  ·  2.0 ×  ·  Dice 0.991" in texts
    assert {"cclip-deploy in ONNX Runtime, new prompt", "cclip-deploy in ONNX Runtime, cached prompt"} <= texts
    assert not any("int8" in text.lower() for text in texts)


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_benchmark(json.loads(json.dumps(result())), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_other_results_are_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no plain export"):
        draw_benchmark(result(results=result()["results"][:1]), tmp_path / "b.png")
    with pytest.raises(DataError, match="bench --peers --json"):
        draw_benchmark({}, tmp_path / "b.png")
    assert list(tmp_path.iterdir()) == []


def test_the_committed_picture_is_of_the_committed_result() -> None:
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "images" / "benchmark.png").stat().st_size < 150_000
    told = json.loads((docs / "measurements" / "rn101_224x224.json").read_text())
    assert (told["network"]["name"], told["network"]["image_hw"]) == ("rn101", [224, 224])
