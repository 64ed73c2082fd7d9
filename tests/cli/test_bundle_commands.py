"""Tests of verify, inspect, bench and build-engine on valid, damaged and inconsistent bundles."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import change_weights, copy_of, digests, flip_byte, reseal
from tests.cli.run import interrupt_at, invoke, run
from tests.ctrl_c import press_in_the_log

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path / "here")


def test_verify_passes_and_prints_the_worst_value_of_each_graph(tiny_bundle_path: Path) -> None:
    done = invoke("verify", tiny_bundle_path, "--threads", "2")
    assert done.exit_code == 0, done.stderr
    for word in ("fused", "chain", "mask_decoder", "relative_error", "mask_dice"):
        assert word in done.stdout
    assert "FAILED" not in done.stdout


def test_verify_prints_json(tiny_bundle_path: Path) -> None:
    done = run("verify", tiny_bundle_path, "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told.keys() == {"schema", "passed", "checks", "notes", "ran", "not_verified"}
    assert told["passed"] is True
    assert told["checks"][0].keys() == {
        "name", "graph", "backend", "precision", "metric", "value", "limit", "passed", "detail",
    }  # fmt: skip


def test_verify_of_an_altered_graph_ends_with_4_and_prints_json(copy: Path) -> None:
    change_weights(copy / "graphs" / "fused.onnx", lambda weights: weights * np.float32(1.05))
    reseal(copy)
    done = run("verify", copy, "--threads", "1", "--json")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert {check["graph"] for check in told["checks"] if not check["passed"]} == {"fused"}
    assert "checks exceed their limit" in done.stderr
    shown = invoke("verify", copy, "--threads", "1")
    assert shown.exit_code == 4
    assert "FAILED" in shown.stdout


def test_verify_of_a_graph_with_nan_outputs_ends_with_4_and_prints_valid_json(copy: Path) -> None:
    change_weights(copy / "graphs" / "fused.onnx", lambda weights: np.full_like(weights, np.nan))
    reseal(copy)
    done = invoke("verify", copy, "--threads", "1", "--json")
    assert done.exit_code == 4

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(done.stdout, parse_constant=refuse)["passed"] is False


@pytest.mark.parametrize("command", ["verify", "inspect", "bench", "build-engine"])
def test_a_flipped_byte_ends_every_command_with_6(command: str, copy: Path) -> None:
    flip_byte(copy / "graphs" / "mask_decoder.onnx")
    before = digests(copy)
    done = invoke(command, copy, "--json")
    assert done.exit_code == 6, done.output
    assert "mask_decoder.onnx was altered" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "BundleError"
    assert digests(copy) == before


@pytest.mark.parametrize("command", ["verify", "inspect", "bench", "build-engine"])
def test_a_missing_bundle_ends_every_command_with_6(command: str, tmp_path: Path) -> None:
    done = invoke(command, tmp_path / "none.cclip")
    assert (done.exit_code, done.stdout) == (6, "")
    assert "Export one: cclip-deploy export CHECKPOINT" in done.stderr


def test_images_without_a_checkpoint_are_a_usage_error(tiny_bundle_path: Path) -> None:
    done = invoke("verify", tiny_bundle_path, "--image", "a.png")
    assert done.exit_code == 2
    assert "give --checkpoint FILE" in done.stderr


def test_inspect_prints_a_table_and_json(tiny_bundle_path: Path) -> None:
    shown = invoke("inspect", tiny_bundle_path)
    assert shown.exit_code == 0
    for word in ("fused", "prompt_encoder", "tiny, deploy form, 64x96, 24 tokens", "checksums match"):
        assert word in shown.stdout
    told = json.loads(run("inspect", tiny_bundle_path, "--json").stdout)
    assert told["graphs"]["fused"].keys() >= {"inputs", "outputs", "multiply_adds", "sha256"}
    assert told["engines"] == []


def test_bench_prints_a_table_and_json(tiny_bundle_path: Path, tmp_path: Path) -> None:
    arguments = ("bench", tiny_bundle_path, "--rounds", "3", "--warmup", "0", "--no-compile", "--threads", "1")
    shown = invoke(*arguments, "--report", tmp_path / "bench.html")
    assert shown.exit_code == 0, shown.stderr
    assert "Not measured: pytorch eager: needs --checkpoint." in shown.stdout
    assert "Round 3 of 3" in shown.stderr
    assert "<td>cached prompt fp32</td>" in (tmp_path / "bench.html").read_text().replace(' class="short"', "")
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told.keys() >= {"fingerprint", "results", "ratios"}
    assert told["results"][0].keys() >= {"name", "backend", "precision", "stage", "p50_ms", "p90_ms", "p99_ms", "n"}


def test_bench_with_peers_needs_the_checkpoint(tiny_bundle_path: Path) -> None:
    done = invoke("bench", tiny_bundle_path, "--peers")
    assert done.exit_code == 2
    assert "give --checkpoint FILE" in done.stderr


def test_bench_prints_figures_with_targets_and_writes_json(
    tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cclip_deploy.benchmark import run as bench

    figure = {
        "what": "128 prompts on one image, against the plain export", "backend": "openvino", "value": 99.0, "unit": "×",
        "low": 98.0, "high": 101.0, "goal": 100.0, "at_least": True, "extrapolated": "128 × one run", "met": False,
        "n": 12, "precision": "fp32", "compared_with": "plain", "baseline": "plain export",
        "baseline_precision": "fp32",
    }  # fmt: skip
    few = {**figure, "low": None, "high": None, "n": 3, "compared_with": "defaults", "goal": None, "met": None}
    few |= {"baseline": "ov.convert_model, OpenVINO defaults", "baseline_precision": "bf16"}
    row = {"stage": "image and prompt", "precision": "bf16", "p50_ms": 5.0, "p90_ms": 6.0, "n": 12}
    baseline = {**row, "name": "OpenVINO defaults", "role": "baseline", "includes_prompt_encoding": True}
    baseline |= {"relative_error": 0.0182, "mask_dice": 0.99144}
    told = {
        "results": [baseline], "ratios": [], "not_measured": [], "bundle": "b", "threads": 2, "figures": [figure, few],
        "peak": {"name": "sgemm", "multiply_adds_per_second": 7e10},
    }  # fmt: skip
    monkeypatch.setattr(bench, "bench_bundle", lambda *_: told)
    kept = tmp_path / "new" / "result.json"
    done = invoke("bench", tiny_bundle_path, "--peers", "--checkpoint", "any.pth", "-o", kept)
    assert done.exit_code == 0, done.stderr
    for words in ("128 prompts on one image *", "99 ×", "98 to 101 ×", "≥ 100 ×", "140 GFLOP/s", "times the number",
                  "none: 3 rounds", "bf16", "encoded", "1.8e-02", "0.9914", "plain export: plain export, fp32.",
                  "OpenVINO defaults: ov.convert_model, OpenVINO defaults, bf16."):  # fmt: skip
        assert words in done.stdout
    assert json.loads(kept.read_text()) == told


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_openvino_runs_if_requested(command: str, tiny_bundle_path: Path) -> None:
    done = invoke(command, tiny_bundle_path, "--backend", "openvino", "--threads", "1", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    rows = told["checks" if command == "verify" else "results"]
    assert {row["backend"] for row in rows} - {"bundle"} == {"openvino"}  # stages run without a backend


def test_missing_openvino_ends_with_3_without_a_fallback(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = invoke("verify", tiny_bundle_path, "--backend", "openvino")
    assert done.exit_code == 3
    assert "pip install 'cclip-deploy[openvino]'" in done.stderr


def test_missing_cuda_ends_with_3_without_a_fallback(tiny_bundle_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a CUDA provider")
    for command in (["verify"], ["bench"]):
        done = invoke(*command, tiny_bundle_path, "--device", "cuda")
        assert done.exit_code == 3
        assert "no CUDAExecutionProvider" in done.stderr


rtx = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("tensorrt_rtx"), reason="TensorRT-RTX is an extra"
)


@rtx
def test_build_engine_adds_engines_that_inspect_and_verify_list(copy: Path) -> None:
    arguments = (
        "build-engine",
        copy,
        "--fp16",
        "--backend",
        "tensorrt-rtx",
        "--graph",
        "mask_decoder",
        "--threads",
        "1",
    )
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (engine,) = json.loads(done.stdout)["engines"]
    assert (engine["graph"], engine["precision"], engine["backend"]) == ("mask_decoder", "fp16", "tensorrt-rtx")
    shown = invoke("build-engine", copy, "--fp32", "--graph", "mask_decoder", "--threads", "1")
    assert shown.exit_code == 0, shown.stderr
    assert "The engines were not run" in shown.stdout
    inspected = invoke("inspect", copy)
    assert "Engines" in inspected.stdout
    told = json.loads(invoke("inspect", copy, "--json").stdout)
    assert [(e["graph"], e["precision"]) for e in told["engines"]] == [
        ("mask_decoder", "fp16"),
        ("mask_decoder", "fp32"),
    ]
    verified = invoke("verify", copy, "--threads", "1")
    assert verified.exit_code == 0, verified.stderr
    assert "not run: that needs a GPU" in " ".join(verified.stdout.split())


@rtx
def test_build_engine_of_an_unknown_graph_ends_with_2(copy: Path) -> None:
    before = digests(copy)
    done = invoke("build-engine", copy, "--graph", "row_decoder")
    assert done.exit_code == 2
    assert "it has prompt_encoder, image_encoder, mask_decoder, fused" in done.stderr
    assert digests(copy) == before


@rtx
@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("moment", ["Parsing node: ", "Original: ", "Layers:"])
def test_ctrl_c_inside_the_binding_ends_with_130_and_changes_nothing(
    moment: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digests(copy)
    press_in_the_log(monkeypatch, moment)
    done = invoke("build-engine", copy, "--fp32", "--graph", "mask_decoder")
    assert done.exit_code == 130, done.output
    assert done.stderr.endswith("Interrupted; nothing was left half-written.\n")
    assert "Exception caught" not in capfd.readouterr().err
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


@rtx
def test_ctrl_c_during_a_build_ends_the_installed_program_with_130(copy: Path) -> None:
    before = digests(copy)
    done = interrupt_at("mask_decoder: Building engine", "build-engine", copy, "--fp32", "--graph", "mask_decoder")
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("Interrupted; nothing was left half-written.\n")
    assert "Traceback" not in done.stderr
    assert digests(copy) == before
    assert os.listdir(copy.parent) == [copy.name]


def test_verify_repairs_prompts_as_predict_does(tiny_bundle_path: Path, tiny_checkpoint: Path) -> None:
    arguments = ("--checkpoint", tiny_checkpoint, "--prompt", "uppper left lung", "--threads", "1", "--json")
    notes = json.loads(invoke("verify", tiny_bundle_path, *arguments).stdout)["notes"]
    assert "Repaired prompt 'uppper left lung': 'uppper' to 'upper'" in notes
    notes = json.loads(invoke("verify", tiny_bundle_path, *arguments, "--no-repair").stdout)["notes"]
    assert not any("Repaired" in note for note in notes)
