"""ONNX Runtime's GPU providers: their options, and IO binding, which a CPU can run too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.reference import expand, load_references
from cclip_deploy.runtime.onnxruntime import session as session_module
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.gpu import OnnxRuntimeGpuBackend, provider_options
from cclip_deploy.runtime.onnxruntime.session import NamedGraph, load_onnxruntime, make_session, register_rtx_plugin

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
RTX = "NvTensorRTRTXExecutionProvider"
GRAPH = NamedGraph(b"", Path("graph.onnx"))


@pytest.fixture
def bound(tiny_bundle: Bundle) -> OnnxRuntimeGpuBackend:
    """IO binding with the CPU's own provider and memory."""
    backend = OnnxRuntimeGpuBackend(tiny_bundle, "fp32", "cpu", 2, memory="cpu")
    backend._providers = lambda entry: [("CPUExecutionProvider", {})]  # type: ignore[method-assign]
    return backend


def test_runs_with_io_binding_match_runs_without(tiny_bundle: Bundle, bound: OnnxRuntimeGpuBackend) -> None:
    plain = OnnxRuntimeBackend(tiny_bundle, threads=2)
    reference = load_references(tiny_bundle)[0]
    for graph, arrays in {
        "prompt_encoder": {"tokens": reference.tokens},
        "mask_decoder": expand(reference.decoder_inputs),
    }.items():
        for name, value in plain.run(graph, arrays).items():
            np.testing.assert_allclose(bound.run(graph, arrays)[name], value, rtol=1e-5, atol=1e-6)


def test_features_stay_on_the_device_between_graphs(tiny_bundle: Bundle, bound: OnnxRuntimeGpuBackend) -> None:
    pixels = np.random.default_rng(0).random((40, 50), np.float32)
    ours, plain = (
        Segmenter.of_bundle(tiny_bundle, bound),
        Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=2)),
    )
    kernels = plain.encode_prompts(["left lung"])
    features = ours.encode_image(pixels)
    assert not isinstance(features, np.ndarray)
    assert features.shape == (1, 64, 96, 32)
    np.testing.assert_allclose(features.numpy(), plain.encode_image(pixels), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    truth = plain.decode(plain.encode_image(pixels), kernels)
    np.testing.assert_allclose(ours.decode(features, kernels), truth, rtol=1e-4, atol=1e-4)
    features.close()
    with pytest.raises(EnvironmentIssue, match="was freed"):
        ours.decode(features, kernels)


def test_only_requested_outputs_are_returned(tiny_bundle: Bundle, bound: OnnxRuntimeGpuBackend) -> None:
    tokens = load_references(tiny_bundle)[0].tokens
    assert bound.run_on_device("prompt_encoder", {"tokens": tokens}, ["kernel"]).keys() == {"kernel"}


def test_options_contain_shapes_and_caches_but_no_precision(tiny_bundle: Bundle, tmp_path: Path) -> None:
    entry = tiny_bundle.graph("image_encoder")
    assert provider_options("cuda", entry, tmp_path) == {"use_tf32": "0"}
    trt = provider_options("tensorrt", entry, tmp_path)
    assert trt["trt_profile_min_shapes"] == trt["trt_profile_opt_shapes"] == "image:1x3x64x96"
    assert trt["trt_profile_max_shapes"] == "image:8x3x64x96"
    assert (trt["trt_fp16_enable"], trt["trt_int8_enable"], trt["trt_bf16_enable"]) == ("0", "0", "0")
    assert trt["trt_engine_cache_path"] == trt["trt_timing_cache_path"] == str(tmp_path / entry.sha256[:16])
    rtx = provider_options("tensorrt-rtx", tiny_bundle.graph("mask_decoder"), tmp_path)
    assert rtx["nv_profile_max_shapes"] == "features:8x64x96x32,kernel:16x9x32,tap_bias:16x9,bias:16"
    assert str(tmp_path) in rtx["nv_runtime_cache_path"]
    assert not any("cache" in key for key in provider_options("tensorrt", entry, None))


def test_operators_without_tensorrt_support_run_in_cuda(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cclip_deploy.runtime.onnxruntime.cpu.load_onnxruntime", lambda device: onnxruntime)
    backend = OnnxRuntimeGpuBackend(tiny_bundle, "fp32", "tensorrt")
    names = [name for name, _ in backend._providers(tiny_bundle.graph("fused"))]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_session_that_fell_back_is_refused(device: Any) -> None:
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    runtime = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *a, **k: fallen)
    with pytest.raises(EnvironmentIssue, match=f"fell back from {device}"):
        make_session(runtime, GRAPH, device)


def test_a_failing_provider_raises_an_environment_issue() -> None:
    seen: dict[str, Any] = {}

    def session(*arguments: Any, **options: Any) -> Any:
        seen.update(options)
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")

    runtime = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=session)
    with pytest.raises(EnvironmentIssue, match=r"cannot run graph\.onnx on cuda: CUDA failure 100.*doctor"):
        make_session(runtime, GRAPH, "cuda")
    assert seen["enable_fallback"] == 0


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has GPU providers")
@pytest.mark.parametrize(
    ("device", "remedy"),
    [("cuda", r"cclip-deploy\[gpu\]"), ("tensorrt", r"cclip-deploy\[gpu,tensorrt\]"), ("tensorrt-rtx", "pip install")],
)  # fmt: skip
def test_a_missing_provider_raises_with_the_install_command(device: Any, remedy: str, tiny_bundle: Bundle) -> None:
    with pytest.raises(EnvironmentIssue, match=remedy):
        OnnxRuntimeGpuBackend(tiny_bundle, "fp32", device)


def test_the_rtx_provider_is_registered_from_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    device = SimpleNamespace(ep_name=RTX)
    runtime = SimpleNamespace(
        get_available_providers=lambda: ["CPUExecutionProvider"],
        get_ep_devices=lambda: [device] if registered else [],
        register_execution_provider_library=lambda name, path: registered.append((name, path)),
    )
    package = SimpleNamespace(get_library_path=lambda: "/somewhere/librtx.so")
    monkeypatch.setitem(sys.modules, session_module.RTX_PLUGIN, package)  # type: ignore[arg-type]
    register_rtx_plugin(runtime)
    register_rtx_plugin(runtime)
    assert registered == [(RTX, "/somewhere/librtx.so")]


def test_a_session_of_the_rtx_package_takes_its_devices_and_options() -> None:
    given: list[Any] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            given.append((devices, options))

    device = SimpleNamespace(ep_name=RTX)
    runtime = SimpleNamespace(
        SessionOptions=Options, get_available_providers=list, get_ep_devices=lambda: [device],
        InferenceSession=lambda model, options, **k: SimpleNamespace(get_providers=lambda: [RTX], given=k),
    )  # fmt: skip
    session = make_session(runtime, GRAPH, "tensorrt-rtx", providers=[(RTX, {"nv_x": "1"})])
    assert given == [([device], {"nv_x": "1"})]
    assert "providers" not in session.given
    runtime.get_ep_devices = list
    with pytest.raises(EnvironmentIssue, match="finds no GPU"):
        make_session(runtime, GRAPH, "tensorrt-rtx")


def test_the_plugin_is_only_loaded_for_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(session_module, "register_rtx_plugin", asked.append)
    load_onnxruntime("cpu")
    assert asked == []
    load_onnxruntime("tensorrt-rtx")
    assert asked == [onnxruntime]
