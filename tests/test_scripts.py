"""Every script of the stage folders runs as a user would run it."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cclip_deploy.data.synthetic import write_dataset
from tests.conftest import THREADS, TINY_HW

ROOT = Path(__file__).parent.parent
STAGES = ("training", "export", "engines", "benchmarks")


Run = Callable[..., str]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script as `python SCRIPT …` in the repository does, and gives what it prints; torch is loaded already."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_trace_graphs_writes_every_graph(run_script: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = run_script("export/trace_graphs.py", tiny_checkpoint, "-o", tmp_path, "--image-size", "32")
    names = {"prompt_encoder", "image_encoder", "mask_decoder", "row_decoder"}
    assert {path.stem for path in tmp_path.glob("*.onnx")} == names
    assert all(f"{name}: " in said for name in names)


@pytest.mark.slow
def test_build_all_builds_every_precision_that_needs_no_pictures(
    run_script: Run, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "copy.cclip"
    shutil.copytree(tiny_bundle_path, bundle)
    said = run_script("engines/build_all.py", bundle, "--graph", "mask_decoder")
    assert "mask_decoder.fp32.tensorrt-rtx.engine" in said
    assert "products: 1 fp16" in said
    assert "products: 1 bf16" in said


@pytest.mark.slow
def test_calibration_curve_prints_a_row_a_method(run_script: Run, tiny_bundle_path: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "films", {"train": 1, "test": 1}, TINY_HW, 7)
    said = run_script(
        "engines/calibration_curve.py", tiny_bundle_path, tmp_path / "films", "--counts", "1", "--threads", THREADS,
        "--json", tmp_path / "curve.json",
    )  # fmt: skip
    told = json.loads((tmp_path / "curve.json").read_text())
    assert [point["method"] for point in told] == ["min-max", "entropy", "percentile"]
    assert f"| min-max | 1 | {told[0]['mean']:.4f} |" in said


@pytest.mark.slow
def test_precision_table_has_a_row_a_precision(run_script: Run, tiny_bundle_path: Path, tmp_path: Path) -> None:
    bundle, films = tmp_path / "copy.cclip", tmp_path / "films"
    shutil.copytree(tiny_bundle_path, bundle)
    write_dataset(films, {"train": 8, "test": 2}, TINY_HW, 7)
    said = run_script(
        "engines/precision_table.py", bundle, "--calibration", films, "--evaluation-set", films,
        "--precision", "fp16", "--precision", "fp8",
    )  # fmt: skip
    rows = [line for line in said.splitlines() if line.startswith(("| fp16 |", "| fp8 |"))]
    assert [row.split(" | ")[0] for row in rows] == ["| fp16", "| fp8"]
    assert " | ok | " in rows[0]
    assert [" fp8, " in row for row in rows] == [False, True]
    table = next(iter(bundle.glob("engines/image_encoder.fp16.*.engine"))).stat().st_size / 1e6
    assert f" | {table:.1f} + " in rows[0]


@pytest.mark.slow
def test_build_profile_builds_what_the_profile_says(run_script: Run, tiny_bundle_path: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "copy.cclip"
    shutil.copytree(tiny_bundle_path, bundle)
    said = run_script(
        "engines/build_profile.py", "engines/profiles/workstation.toml", bundle, "--graph", "mask_decoder"
    )
    assert "mask_decoder.fp16.tensorrt-rtx.engine: " in said
    assert "for compute capability 8.6, 8.9, 12.0" in said
    assert "--precision fp16 --backend tensorrt-rtx --gpu-interface cuda-python --cuda-graphs" in said


@pytest.mark.slow
def test_compare_keeps_its_result(run_script: Run, tiny_bundle_path: Path, tmp_path: Path) -> None:
    said = run_script("benchmarks/compare.py", tiny_bundle_path, "-o", tmp_path / "bench.json", "--rounds", "3")
    assert (tmp_path / "bench.json").is_file()
    assert "kept in" in said


@pytest.mark.slow
def test_suite_measures_and_draw_draws(
    run_script: Run, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    said = run_script(
        "benchmarks/suite.py", tiny_bundle_path, "--checkpoint", tiny_checkpoint, "-o", tmp_path, "--rounds", "3",
        "--budget", "1", "--no-compile", "--threads", THREADS,
    )  # fmt: skip
    result = json.loads((tmp_path / "tiny_64x96.json").read_text())
    assert {"8 × image, 128 × prompt", "1 × image, 1 × prompt"} <= {row["stage"] for row in result["results"]}
    assert "onnxruntime: 128 prompts on one image against the plain export: " in said
    run_script("benchmarks/draw.py", tmp_path / "tiny_64x96.json", "-o", tmp_path / "drawn" / "benchmark.png")
    with Image.open(tmp_path / "drawn" / "benchmark.png") as picture:
        assert picture.width > 900


@pytest.mark.slow
def test_interval_coverage_keeps_its_result_and_prints_its_tables(run_script: Run, tmp_path: Path) -> None:
    result = tmp_path / "new" / "coverage.json"
    said = run_script("benchmarks/interval_coverage.py", "-o", result, "--data-sets", "3")
    told = json.loads(result.read_text())
    assert {row["method"] for row in told["patients"]} == {"percentile", "BCa", "studentized"}
    assert "| Dice, pooled | studentized | " in said
    again = run_script("benchmarks/interval_coverage.py", "-o", result, "--tables-only")
    assert said.endswith(again)


@pytest.mark.slow
def test_train_synthetic_trains_and_scores(run_script: Run, tmp_path: Path) -> None:
    said = run_script("training/train_synthetic.py", "-o", tmp_path, "--films", "8", "--epochs", "1")
    assert (tmp_path / "training" / "last.safetensors").is_file()
    assert "shuffled prompts" in said


SCRIPTS = [p.relative_to(ROOT).as_posix() for stage in STAGES for p in sorted((ROOT / stage).glob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_tested(script: str) -> None:
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) <= 60
    assert "def main() -> None:" in text
    assert script in Path(__file__).read_text()
