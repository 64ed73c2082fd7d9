"""The results file of a run on a GPU, tested without one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.gpu.results import GpuResults


def test_results_are_a_json_file_and_a_page_named_after_the_gpu(tmp_path: Path) -> None:
    results = GpuResults({"gpu": [{"name": "NVIDIA L4 (24 GB)"}]})
    results.add("Latency", graph="image_encoder", p50=1.23456)
    results.add("Latency", graph="mask_decoder", p50=None, n=3)
    results.outcomes = {"test_a": "passed", "test_b[fp8]": "skipped: FP8 needs 8.9", "test_c": "failed"}
    content, page = results.write(tmp_path / "new")
    assert content.name == "nvidia-l4-24-gb.json"
    assert json.loads(content.read_text())["tables"]["Latency"][0]["p50"] == 1.23456
    text = page.read_text()
    assert "| graph | p50 | n |\n|---|---|---|\n| image_encoder | 1.235 | not measured |\n" in text
    assert "| mask_decoder | not measured | 3 |" in text
    assert "1 passed, 1 failed." in text
    assert "- `test_b[fp8]`: skipped: FP8 needs 8.9" in text
