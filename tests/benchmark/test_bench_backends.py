"""Tests of `bench` with a backend or a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.benchmark import run as bench
from cclip_deploy.benchmark.baselines import Baselines
from cclip_deploy.benchmark.process import ProcessCost
from cclip_deploy.bundle.bundle import Bundle, edited_bundle, write_manifest
from cclip_deploy.datasets.synthetic.generator import make_sample
from cclip_deploy.engines.convert import ConvertOptions, convert_graphs
from cclip_deploy.quantization.calibrate import CalibrationOptions
from tests.bundles import copy_of, flip_byte
from tests.cli.run import invoke
from tests.conftest import THREADS, TINY_HW
from tests.made_once import made_once

GRAPHS = ("image_encoder", "prompt_encoder", "mask_decoder")
QUICK = ("--rounds", "3", "--warmup", "0", "--no-compile", "--threads", str(THREADS))


@pytest.fixture(scope="session")
def mixed_bundle_path(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with int8-fp16 graphs, which OpenVINO cannot run."""

    def make(path: Path) -> None:
        films = path.parent / "films"
        films.mkdir()
        for seed in range(8):
            pixels = make_sample(np.random.default_rng(seed), TINY_HW).image
            Image.fromarray((pixels * 255).astype(np.uint8)).save(films / f"{seed}.png")
        bundle = Bundle.open(copy_of(tiny_bundle_path, path.parent, path.name))
        calibration = CalibrationOptions((films,), "min-max")
        with edited_bundle(bundle) as folder:
            options = ConvertOptions("int8-fp16", GRAPHS, calibration, threads=THREADS)
            write_manifest(folder, convert_graphs(bundle, options, folder, lambda _: None).manifest)

    return made_once(tmp_path_factory, "int8-fp16.cclip", make)


@pytest.fixture
def plain_at_hand(plain_bundle_path: Path, tiny_checkpoint: Path) -> tuple[Any, ...]:
    """Options with an existing plain bundle, so that none is exported."""
    return ("--checkpoint", tiny_checkpoint, "--plain", plain_bundle_path)


def told_by(*arguments: Any) -> dict[str, Any]:
    done = invoke("bench", *arguments, *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_with_peers_a_given_backend_alone_runs_the_bundle(
    tiny_bundle_path: Path, plain_at_hand: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def measure(command: list[str]) -> ProcessCost:
        commands.append(command)
        return ProcessCost(1.0, 10**8, 3)

    monkeypatch.setattr(bench, "measure_command", measure)
    monkeypatch.setattr(Baselines, "of_openvino_conversion", lambda *_: [])
    told = told_by(tiny_bundle_path, "--peers", "--backend", "openvino", *plain_at_hand)
    (command,) = commands
    assert command[command.index("--backend") + 1] == "openvino"
    assert {row["backend"] for row in told["results"] if row["ours"]} == {"openvino"}
    assert told["predict"].keys() == {"openvino"}
    assert {figure["backend"] for figure in told["figures"]} <= {"openvino", "onnxruntime", None}
    assert {"plain export", "pytorch eager"} <= {row["name"] for row in told["results"]}


def test_a_missing_device_ends_with_3_with_peers_too(tiny_bundle_path: Path, plain_at_hand: tuple[Any, ...]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a CUDA provider")
    done = invoke("bench", tiny_bundle_path, "--peers", "--device", "cuda", *plain_at_hand, *QUICK)
    assert done.exit_code == 3
    assert "no CUDAExecutionProvider" in done.stderr


def test_openvino_on_a_gpu_is_a_usage_error(tiny_bundle_path: Path) -> None:
    done = invoke("bench", tiny_bundle_path, "--backend", "openvino", "--device", "cuda", *QUICK)
    assert done.exit_code == 2
    assert "OpenVINO does not run on the device cuda" in done.stderr


def test_int8_with_an_fp16_rest_is_timed_in_onnx_runtime_and_listed_for_openvino(
    mixed_bundle_path: Path, plain_at_hand: tuple[Any, ...]
) -> None:
    told = told_by(mixed_bundle_path, *plain_at_hand)
    errors = {row["name"]: row["relative_error"] for row in told["results"] if "relative_error" in row}
    assert 0 < errors["cached prompt int8-fp16"] < 0.3
    in_openvino = told_by(mixed_bundle_path, "--backend", "openvino")
    assert {row["precision"] for row in in_openvino["results"]} == {"fp32"}
    left_out = {row["name"]: row["reason"] for row in in_openvino["not_measured"]}
    assert "OpenVINO" in left_out["graphs int8-fp16, OpenVINO"]


def test_an_altered_graph_is_an_error_and_not_left_out(mixed_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(mixed_bundle_path, tmp_path)
    flip_byte(copy / "graphs" / "image_encoder.int8-fp16.onnx")
    done = invoke("bench", copy, *QUICK)
    assert done.exit_code == 6
    assert "image_encoder.int8-fp16.onnx was altered" in done.stderr
