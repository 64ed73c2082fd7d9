"""Every script of the stage folders runs as a user would run it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.tables.precision import costs
from benchmarks.tables.sources import Measurements
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli import entry
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.export.export import ExportOptions, export_bundle
from cclip_deploy.quantization.agreement import evaluation_images, measure_mask_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions
from tests.cli.run import without
from tests.conftest import THREADS, TINY_HW
from tests.ctrl_c import handled_by

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
        with handled_by(entry.receive):
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
def test_precision_table_writes_a_row_a_precision(run_script: Run, tiny_bundle_path: Path, tmp_path: Path) -> None:
    bundle, films = tmp_path / "copy.cclip", tmp_path / "films"
    shutil.copytree(tiny_bundle_path, bundle)
    write_dataset(films, {"train": 8, "test": 2}, TINY_HW, 7)
    said = run_script(
        "engines/precision_table.py", bundle, "--calibration", films, "--evaluation-set", films,
        "--precision", "fp16", "--precision", "fp8", "--json", tmp_path / "precision_tiny.json",
    )  # fmt: skip
    assert "fp16: verified, " in said
    rows = json.loads((tmp_path / "precision_tiny.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp16", "fp8"]
    assert ["fp8" in row["layers"] for row in rows] == [False, True]
    assert rows[0]["features_error"] < rows[1]["features_error"]
    engines = {path.name.split(".")[0]: path.stat().st_size for path in bundle.glob("engines/*.fp16.*.engine")}
    assert rows[0]["engine_bytes"] == engines
    judging = evaluation_images(CalibrationOptions((films,), evaluation_set=(films,)))
    assert rows[0]["masks"] == measure_mask_agreement(Bundle.open(bundle), "fp16", judging).model_dump(mode="json")
    table = costs("precision_tiny.json")(Measurements(tmp_path))
    assert f"| fp16 | {rows[0]['layers']['fp16']} fp16 | {engines['image_encoder'] / 1e6:.1f} + " in table


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
    assert "written to" in said


@pytest.mark.slow
def test_suite_measures_and_draw_draws(
    run_script: Run, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    said = run_script(
        "benchmarks/suite.py", tiny_bundle_path, "--checkpoint", tiny_checkpoint, "-o", tmp_path, "--rounds", "3",
        "--budget", "1", "--no-compile", "--threads", THREADS, "--workload", "2", "3", "--workload", "1", "4",
    )  # fmt: skip
    result = json.loads((tmp_path / "tiny_64x96.json").read_text())
    assert {"2 × image, 3 × prompt", "1 × image, 4 × prompt"} <= {row["stage"] for row in result["results"]}
    for prompts in ("new", "cached"):
        assert f"onnxruntime: 4 {prompts} prompts on one image, against the plain export in ONNX Runtime: " in said
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


@pytest.mark.slow
def test_multiply_adds_counts_the_network_and_the_graphs(
    run_script: Run, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """PyTorch's count of the whole network, above that of the plain graph by the second branch."""
    options = ExportOptions(TINY_HW, plain=True, threads=THREADS)
    plain = export_bundle(tiny_checkpoint, tmp_path / "plain.cclip", options, "test").bundle
    run_script(
        "benchmarks/multiply_adds.py", tiny_bundle_path, plain.path, "--checkpoint", tiny_checkpoint,
        "-o", tmp_path / "counts.json",
    )  # fmt: skip
    counts = json.loads((tmp_path / "counts.json").read_text())
    graphs = Bundle.open(tiny_bundle_path).manifest.graphs
    assert counts["graphs"]["image_encoder"] == graphs["image_encoder"].multiply_adds
    assert counts["plain"] == plain.graph("plain").multiply_adds
    assert counts["plain"] < counts["published"] < 2 * counts["plain"]


SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for stage in STAGES
    for path in sorted((ROOT / stage).glob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_tested(script: str) -> None:
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) <= 60
    assert "def main() -> None:" in text
    assert "    run_script(main)" in text
    assert script in MISSING_FILE
    assert Path(__file__).read_text().count(script) > 2


MISSING_FILE = {
    "training/train_synthetic.py": ("none.toml", 6),
    "export/trace_graphs.py": ("none.safetensors", 6),
    "engines/build_all.py": ("none.cclip", 6),
    "engines/build_profile.py": ("none.toml none.cclip", 6),
    "engines/calibration_curve.py": ("none.cclip none", 6),
    "engines/precision_table.py": ("none.cclip --calibration none --evaluation-set none", 6),
    "benchmarks/compare.py": ("none.cclip", 6),
    "benchmarks/draw.py": ("none.json", 6),
    "benchmarks/interval_coverage.py": ("--tables-only -o none.json", 6),
    "benchmarks/multiply_adds.py": ("none.cclip none2.cclip --checkpoint none.safetensors", 6),
    "benchmarks/suite.py": ("none.cclip --checkpoint none.safetensors", 6),
}
"""Of every script, arguments that name files which are not there, and the exit code."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_file_is_one_message_and_the_exit_code_of_the_command_line(
    script: str, run_script: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, code = MISSING_FILE[script]
    there = [str(tmp_path / argument) if argument.startswith("none") else argument for argument in arguments.split()]
    with pytest.raises(SystemExit) as end:
        run_script(script, *there)
    said = capsys.readouterr()
    assert end.value.code == code, said.err
    assert said.err.startswith("Error: ")
    assert f"{tmp_path}/none" in said.err
    assert said.err.count("\n") == 1


def run_without(packages: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python in which packages are not installed."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, **without(*packages.split())},
    )  # fmt: skip


def assert_names_what_is_missing(done: subprocess.CompletedProcess[str], package: str, extra: str) -> None:
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Error: ")
    assert package in done.stderr
    assert f"pip install 'cclip-deploy[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["torch", "lightning"])
def test_training_without_a_package_draws_nothing(package: str, tmp_path: Path) -> None:
    done = run_without(package, "training/train_synthetic.py", "-o", tmp_path / "run")
    assert_names_what_is_missing(done, package, "train")
    assert not (tmp_path / "run").exists()


def test_tracing_without_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run_without("torch onnx", "export/trace_graphs.py", tiny_checkpoint, "-o", tmp_path / "graphs")
    assert_names_what_is_missing(done, "torch, onnx", "export")
    assert not (tmp_path / "graphs").exists()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("engines/build_all.py", "BUNDLE"),
        ("engines/build_profile.py", "engines/profiles/workstation.toml BUNDLE"),
        ("engines/precision_table.py", "BUNDLE --calibration DATA --evaluation-set DATA --precision fp16"),
    ],
)
def test_building_engines_without_tensorrt(script: str, arguments: str, tiny_bundle_path: Path, tmp_path: Path) -> None:
    if "DATA" in arguments:
        write_dataset(tmp_path / "data", {"train": 8, "test": 1}, TINY_HW, 7)
    places = {"BUNDLE": str(tiny_bundle_path), "DATA": str(tmp_path / "data")}
    done = run_without("tensorrt tensorrt_rtx", script, *(places.get(part, part) for part in arguments.split()))
    assert_names_what_is_missing(done, "tensorrt-rtx", "rtx")


def test_calibrating_without_onnx(tiny_bundle_path: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 8, "test": 1}, TINY_HW, 7)
    done = run_without("onnx", "engines/calibration_curve.py", tiny_bundle_path, tmp_path / "data", "--counts", 1)
    assert_names_what_is_missing(done, "onnx", "export")


def test_counting_without_torch(tiny_bundle_path: Path, tiny_checkpoint: Path) -> None:
    bundles = (tiny_bundle_path, tiny_bundle_path)
    done = run_without("torch", "benchmarks/multiply_adds.py", *bundles, "--checkpoint", tiny_checkpoint)
    assert_names_what_is_missing(done, "torch", "export")


@pytest.mark.parametrize("script", ["benchmarks/compare.py", "benchmarks/suite.py"])
def test_comparing_with_pytorch_without_torch(
    script: str, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run_without("torch", script, tiny_bundle_path, "--checkpoint", tiny_checkpoint, "-o", tmp_path / "out")
    assert_names_what_is_missing(done, "torch", "export")
    assert not (tmp_path / "out").is_file()


def test_drawing_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    done = run_without("matplotlib", "benchmarks/draw.py", tmp_path / "result.json")
    assert done.returncode == 3
    assert "pip install 'cclip-deploy[evaluate]'" in done.stderr
