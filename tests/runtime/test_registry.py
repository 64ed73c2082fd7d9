"""Backends open by name, and fall back only where that is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.runtime import registry
from cclip_deploy.runtime.registry import BackendConfig, engine_precisions, open_backend, opened, precisions_to_run
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.fake_tensorrt import FakeTensorRt, engine_bundle


@pytest.fixture
def engines(tiny_bundle_path: Path, tmp_path: Path) -> Bundle:
    return engine_bundle(tiny_bundle_path, tmp_path)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise EnvironmentIssue("There is no NVIDIA driver here.")

    monkeypatch.setattr("cclip_deploy.runtime.tensorrt.runner.open_gpu", refuse)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_backends_open_by_name(tiny_bundle: Bundle, name: str) -> None:
    backend = open_backend(BackendConfig(name, threads=1), tiny_bundle)  # type: ignore[arg-type]
    assert (backend.name, backend.precision) == (name, "fp32")


def test_unknown_backends_and_devices_raise(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no backend 'abacus'.*onnxruntime, openvino, tensorrt, tensorrt-rtx"):
        open_backend(BackendConfig("abacus"), tiny_bundle)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="OpenVINO does not run on the device cuda"):
        open_backend(BackendConfig("openvino", "cuda"), tiny_bundle)
    with pytest.raises(UsageError, match="TensorRT-RTX does not run on the device cuda"):
        open_backend(BackendConfig("tensorrt-rtx", "cuda"), tiny_bundle)


def test_engines_run_with_their_binding_and_are_closed(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()

    def make(bundle: Bundle, precision: str, name: Any, options: Any) -> TensorRtBackend:
        return TensorRtBackend(bundle, precision, name, options, gpu, FakeTensorRt(gpu, bundle))  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "TensorRtBackend", make)
    with opened(BackendConfig("tensorrt-rtx"), engines, "fp32") as found:
        assert found.backend.name == "tensorrt-rtx"
        assert found.to_dict() == {
            "asked": "tensorrt-rtx", "ran": "tensorrt-rtx", "precision": "fp32", "arithmetic": None,
            "fallback_reason": None,
        }  # fmt: skip
        assert found.notes({}) == []
    assert gpu.is_closed
    assert gpu.leaks() == {}


def test_without_a_gpu_engines_are_an_error(engines: Bundle, no_gpu: None) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with (
        pytest.raises(EnvironmentIssue, match="no NVIDIA driver"),
        opened(BackendConfig("tensorrt-rtx"), engines, "fp32"),
    ):
        pass


def test_an_allowed_fallback_is_reported_with_its_reason(engines: Bundle, no_gpu: None) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with opened(BackendConfig("tensorrt-rtx", threads=1, allow_fallback=True), engines, "fp32") as found:
        assert found.backend.name == "onnxruntime"
        assert (found.requested, found.ran) == ("tensorrt-rtx", "onnxruntime on cpu")
        assert found.to_dict()["fallback_reason"] == "There is no NVIDIA driver here."
        assert found.notes({}) == ["onnxruntime on cpu ran instead of tensorrt-rtx: There is no NVIDIA driver here."]


def test_a_missing_engine_does_not_cause_a_fallback(tiny_bundle: Bundle) -> None:
    with (
        pytest.raises(UsageError, match="no fp16 engine for tensorrt-rtx"),
        opened(BackendConfig("tensorrt-rtx", allow_fallback=True), tiny_bundle, "fp16"),
    ):
        pass
    with pytest.raises(UsageError, match="build-engine BUNDLE --fp16 --backend tensorrt"):
        engine_precisions(tiny_bundle, "tensorrt")


def test_a_provider_that_fails_on_its_first_session_causes_a_fallback(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Failing:
        name = "onnxruntime"

        def load(self, graph: str) -> None:
            loaded.append(graph)
            raise EnvironmentIssue("fell back")

    monkeypatch.setattr(registry, "OnnxRuntimeGpuBackend", lambda *a: Failing())
    with opened(BackendConfig(device="cuda", allow_fallback=True), tiny_bundle, "fp32") as found:
        assert (found.requested, found.ran, found.fallback_reason) == (
            "onnxruntime on cuda",
            "onnxruntime on cpu",
            "fell back",
        )
    with pytest.raises(EnvironmentIssue, match="fell back"), opened(BackendConfig(device="cuda"), tiny_bundle, "fp32"):
        pass
    costs = {name: graph.multiply_adds for name, graph in tiny_bundle.manifest.graphs.items()}
    assert loaded == [min(costs, key=costs.__getitem__)] * 2


def test_onnxruntime_on_the_cpu_has_no_fallback(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise EnvironmentIssue("no onnxruntime")

    monkeypatch.setattr(registry, "OnnxRuntimeBackend", refuse)
    with pytest.raises(EnvironmentIssue), opened(BackendConfig(allow_fallback=True), tiny_bundle, "fp32"):
        pass


def test_precisions_that_a_backend_cannot_run_have_reasons(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "precisions", lambda self: ("fp32", "bf16", "int8", "int8-fp16"))
    assert precisions_to_run(BackendConfig(), tiny_bundle) == (("fp32", "bf16", "int8", "int8-fp16"), {})
    runs, reasons = precisions_to_run(BackendConfig("openvino"), tiny_bundle)
    assert runs == ("fp32", "bf16", "int8")
    assert reasons.keys() == {"int8-fp16"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    runs, reasons = precisions_to_run(BackendConfig(), tiny_bundle)
    assert runs == ("fp32", "int8", "int8-fp16")
    assert "needs the package onnx" in reasons["bf16"]


def test_segmenter_needs_engines_of_all_three_graphs(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """A quantized image encoder's engine is not replaced by the FP32 one that lies beside it."""
    bundle = engine_bundle(tiny_bundle_path, tmp_path)
    fused = bundle.manifest.engines[0].model_copy(update={"graph": "fused", "precision": "int8"})
    manifest = bundle.manifest.model_copy(update={"engines": (*bundle.manifest.engines, fused)})
    bundle = Bundle(bundle.path, manifest, bundle.sums)
    gpu = FakeGpu()
    backend = TensorRtBackend(bundle, "int8", "tensorrt-rtx", None, gpu, FakeTensorRt(gpu, bundle))  # type: ignore[arg-type]
    with backend, pytest.raises(UsageError, match=r"no int8 .* engine of image_encoder.*--int8 --calibration DATA"):
        Segmenter.of_bundle(bundle, backend)
