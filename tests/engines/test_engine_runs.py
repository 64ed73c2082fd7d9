"""Engines in verify and bench, on a fake GPU and binding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.benchmark.plan import BenchOptions
from cclip_deploy.benchmark.run import bench_bundle
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.runtime import registry as choice_module
from cclip_deploy.runtime.registry import BackendConfig
from cclip_deploy.runtime.tensorrt.runner import GpuOptions, TensorRtBackend
from cclip_deploy.runtime.tensorrt.settings import EngineSettings
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.bundles import copy_of
from tests.conftest import THREADS
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.fake_tensorrt import FakeTensorRt, engine_bundle

ENGINES = BackendConfig("tensorrt-rtx", gpu=GpuOptions(cuda_graphs=True))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[FakeGpu]:
    """Every device that was opened."""
    opened: list[FakeGpu] = []

    def make(bundle: Bundle, precision: str, name: Any, options: Any) -> TensorRtBackend:
        opened.append(FakeGpu())
        binding: Any = FakeTensorRt(opened[-1], bundle, most=(16,))
        return _Made(bundle, precision, name, options, opened[-1], binding)

    class _Made(TensorRtBackend):
        pass

    monkeypatch.setattr(choice_module, "TensorRtBackend", make)
    return opened


@pytest.fixture
def bundle(tiny_bundle_path: Path, tmp_path: Path) -> Bundle:
    return engine_bundle(tiny_bundle_path, tmp_path)


def test_verify_runs_every_engine_and_their_chain(bundle: Bundle, gpus: list[FakeGpu]) -> None:
    found = verify_bundle(bundle, VerifyOptions(threads=THREADS, choice=ENGINES))
    assert {check.backend for check in found.checks} - {"bundle", "onnx"} == {"tensorrt-rtx"}
    compared = [
        check
        for check in found.checks
        if check.backend == "tensorrt-rtx" and check.metric not in ("precision_honoured", "graph_unchanged")
    ]
    assert {check.graph for check in compared} == {"image_encoder", "prompt_encoder", "mask_decoder", "chain"}
    assert all(check.passed for check in compared)
    assert [row["ran"] for row in found.ran] == ["tensorrt-rtx"]
    assert not any("not run" in note for note in found.notes)
    assert gpus[0].calls.count("launch") > 0
    assert gpus[0].is_closed
    assert gpus[0].leaks() == {}


def test_verify_notes_which_engines_did_not_run(bundle: Bundle) -> None:
    notes = verify_bundle(bundle, VerifyOptions(threads=THREADS)).notes
    assert sum("not run: that needs a GPU and --backend tensorrt-rtx" in note for note in notes) == 3


def test_bench_times_engines_with_features_on_the_device(bundle: Bundle, gpus: list[FakeGpu]) -> None:
    options = BenchOptions(rounds=3, warmup_rounds=0, backend="tensorrt-rtx", choice=ENGINES)
    result = bench_bundle(bundle, options)
    rows = {row["name"]: row for row in result["results"]}
    assert rows.keys() == {
        "new prompt fp32, TensorRT-RTX", "cached prompt fp32, TensorRT-RTX", "prompt fp32, TensorRT-RTX",
        "one more prompt fp32, TensorRT-RTX",
    }  # fmt: skip
    assert all(row["ran"] == "tensorrt-rtx" for row in rows.values())
    assert not any("on tensorrt-rtx" in row["name"] for row in result["not_measured"])
    assert gpus[0].is_closed
    assert gpus[0].leaks() == {}


def test_an_engine_entry_names_its_target_gpus(tiny_bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    copy = copy_of(tiny_bundle_path, tmp_path)
    decoder = ("mask_decoder",)
    (portable,) = build_engines(Bundle.open(copy), BuildOptions("fp32", graphs=decoder, threads=THREADS))
    assert portable.target == "portable (Ampere and later)"
    assert portable.runs_on is not None
    assert portable.runs_on.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    targeted = BuildOptions(
        "fp32", graphs=decoder, threads=THREADS, usual_prompts=4, settings=EngineSettings(("8.6", "8.9"))
    )
    (chosen,) = build_engines(Bundle.open(copy), targeted)
    assert chosen.target == "compute capability 8.6, 8.9"
    assert chosen.shapes["bias"] == ((1,), (4,), (16,))
    assert Bundle.open(copy).manifest.engines == (chosen,)
