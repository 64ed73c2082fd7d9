"""Tests of `--backend` with engines: an error without a GPU, unless a fallback is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from tests.bundles import copy_of
from tests.cli.run import invoke
from tests.gpu.machine import gpu_reason
from tests.runtime.fake_tensorrt import engine_bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytestmark = pytest.mark.skipif(gpu_reason() is None, reason="this machine has a GPU: see tests/gpu")

RTX = ("--backend", "tensorrt-rtx")


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return engine_bundle(tiny_bundle_path, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_without_a_gpu_the_exit_code_is_3(bundle: Bundle, command: str) -> None:
    done = invoke(command, bundle.path, *RTX, "--threads", "2")
    assert done.exit_code == 3
    assert "There is no NVIDIA driver here" in done.stderr
    assert "docker run --gpus all" in done.stderr


def test_predict_without_a_gpu_writes_nothing(bundle: Bundle, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("predict", bundle.path, film, "--prompt", "left lung", "-o", out, *RTX, "--gpu-interface", "pycuda")
    assert done.exit_code == 3
    assert "pycuda cannot be imported" in done.stderr
    assert not out.exists()


def test_predict_reports_the_fallback(bundle: Bundle, film: Path, tmp_path: Path) -> None:
    arguments = (bundle.path, film, "--prompt", "left lung", "-o", tmp_path / "out", *RTX, "--allow-fallback")
    done = invoke("predict", *arguments, "--threads", "2", "--json")
    assert done.exit_code == 0, done.stderr
    ran = json.loads(done.stdout)["ran"]
    assert (ran["asked"], ran["ran"], ran["precision"]) == ("tensorrt-rtx", "onnxruntime on cpu", "fp32")
    assert "no NVIDIA driver" in ran["fallback_reason"]
    told = invoke("predict", *arguments, "--threads", "2").stdout
    assert "onnxruntime on cpu ran instead of tensorrt-rtx" in told


def test_predict_lists_the_unused_engines_and_the_backend_that_runs_them(
    bundle: Bundle, film: Path, tmp_path: Path
) -> None:
    arguments = ("predict", bundle.path, film, "--prompt", "left lung", "-o", tmp_path / "out", "--threads", "2")
    ran = json.loads(invoke(*arguments, "--json").stdout)["ran"]
    assert (ran["backend"], ran["device"]) == ("onnxruntime", "cpu")
    assert [row["file"] for row in ran["engines_not_used"]] == [entry.file for entry in bundle.manifest.engines]
    said = " ".join(invoke(*arguments).stdout.split())
    assert "Ran: onnxruntime on cpu; image_encoder fp32, prompt_encoder fp32, mask_decoder fp32." in said
    assert (
        "The bundle's tensorrt-rtx engines were not used (image_encoder fp32, prompt_encoder fp32, mask_decoder fp32). "
        "On a GPU, use them with --backend tensorrt-rtx and --precision fp32."
    ) in said


def test_bench_reports_the_fallback(bundle: Bundle) -> None:
    done = invoke("bench", bundle.path, *RTX, "--allow-fallback", "--rounds", "3", "--warmup", "0", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert rows
    assert {(row["backend"], row["ran"], row["asked"]) for row in rows} == {
        ("onnxruntime", "onnxruntime on cpu", "tensorrt-rtx")
    }


def test_a_bundle_without_engines_is_a_usage_error(tiny_bundle_path: Path) -> None:
    done = invoke("verify", tiny_bundle_path, *RTX, "--allow-fallback")
    assert done.exit_code == 2
    assert "has no fp16 engine for tensorrt-rtx" in done.stderr


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_a_missing_provider_is_an_error_unless_a_fallback_is_allowed(tiny_bundle_path: Path, device: str) -> None:
    done = invoke("verify", tiny_bundle_path, "--device", device)
    assert done.exit_code == 3


def test_verify_reports_the_fallback(tiny_bundle_path: Path) -> None:
    done = invoke("verify", tiny_bundle_path, "--device", "cuda", "--allow-fallback", "--threads", "2", "--json")
    told = json.loads(done.stdout)
    assert [(row["asked"], row["ran"]) for row in told["ran"]] == [("onnxruntime on cuda", "onnxruntime on cpu")]
    assert any("ran instead of onnxruntime on cuda" in note for note in told["notes"])


def test_a_build_profile_is_built_and_excludes_other_options(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy, profile = copy_of(tiny_bundle_path, tmp_path), tmp_path / "mine.toml"
    profile.write_text(
        'name = "mine"\nwhy = "a test"\nbackend = "tensorrt-rtx"\nprecision = "fp32"\ngraphs = ["mask_decoder"]\n'
        "[shapes]\nmax_prompts = 5\n"
    )
    done = invoke("build-engine", copy, "--profile", profile, "--threads", "1", "--json")
    assert done.exit_code == 0, done.stderr
    (engine,) = json.loads(done.stdout)["engines"]
    assert (engine["graph"], engine["precision"], engine["shapes"]["bias"]) == ("mask_decoder", "fp32", [[1], [1], [5]])
    refused = invoke("build-engine", copy, "--profile", profile, "--fp16")
    assert refused.exit_code == 2
    assert "Remove the options that set them" in refused.stderr
