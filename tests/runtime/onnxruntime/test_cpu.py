"""ONNX Runtime agrees with PyTorch and does not fall back to another device."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.reference import expand, load_references
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session
from cclip_deploy.runtime.pytorch import PyTorchBackend

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def distance(value: np.ndarray, truth: np.ndarray) -> float:
    """Relative error, in float64."""
    return float(np.linalg.norm(value.astype(np.float64) - truth) / np.linalg.norm(truth.astype(np.float64)))


@pytest.mark.parametrize("rows", [1, 3])
def test_every_graph_matches_the_plain_network_for_any_batch(
    tiny_bundle: Bundle, tiny_network: CausalCLIPSeg, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    image = rng.standard_normal((rows, 3, *tiny_bundle.manifest.image_hw)).astype(np.float32)
    tokens = np.zeros((rows, 24), np.int64)
    tokens[:, 0], tokens[:, 1:4], tokens[:, 4] = 49406, rng.integers(320, 49000, (rows, 3)), 49407
    ours, plain = OnnxRuntimeBackend(tiny_bundle, threads=2), PyTorchBackend(tiny_network)
    decoder = {
        "features": rng.standard_normal((rows, *tiny_bundle.manifest.image_hw, 32)).astype(np.float32),
        **plain.run("prompt_encoder", {"tokens": np.repeat(tokens, 2, axis=0)}),
    }
    inputs: dict[str, dict[str, np.ndarray]] = {
        "image_encoder": {"image": image},
        "prompt_encoder": {"tokens": tokens},
        "mask_decoder": decoder,
        "fused": {"image": image, "tokens": tokens},
    }
    for graph, arrays in inputs.items():
        answers, truths = ours.run(graph, arrays), plain.run(graph, arrays)
        assert answers.keys() == {output.name for output in tiny_bundle.graph(graph).outputs}
        for name, answer in answers.items():
            assert answer.dtype == np.float32
            assert answer.shape == truths[name].shape
            assert distance(answer, truths[name]) <= 1e-5, (graph, name)


def test_a_graph_is_checked_and_loaded_once_and_only_when_it_is_needed(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bytes] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, *args: Any, **kwargs: Any) -> Any:
        loaded.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    backend = OnnxRuntimeBackend(tiny_bundle, threads=1)
    assert loaded == []
    decoder_inputs = expand(load_references(tiny_bundle)[0].decoder_inputs)
    backend.load("mask_decoder")
    for _ in range(2):
        backend.run("mask_decoder", decoder_inputs)
    assert loaded == [(tiny_bundle.path / "graphs/mask_decoder.onnx").read_bytes()]


def test_strided_inputs_are_accepted(tiny_bundle: Bundle) -> None:
    inputs = expand(load_references(tiny_bundle)[0].decoder_inputs)
    backend = OnnxRuntimeBackend(tiny_bundle, threads=1)
    strided = {name: np.asfortranarray(value) for name, value in inputs.items()}
    np.testing.assert_array_equal(
        backend.run("mask_decoder", strided)["logits"], backend.run("mask_decoder", inputs)["logits"]
    )


def test_a_precision_that_the_bundle_lacks_is_named(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no graph 'fused\.fp16'"):
        OnnxRuntimeBackend(tiny_bundle, "fp16").load("fused")


def test_threads_are_set(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle) -> None:
    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, options: Any, **kwargs: Any) -> Any:
        seen.append(options)
        return real(model, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxRuntimeBackend(tiny_bundle, threads=1).load("mask_decoder")
    assert (seen[0].intra_op_num_threads, seen[0].inter_op_num_threads) == (1, 1)
    with pytest.raises(UsageError, match="0 threads"):
        OnnxRuntimeBackend(tiny_bundle, threads=0).load("mask_decoder")


def test_an_unknown_device_is_a_usage_error(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no device 'tpu'\. Use one of cpu, cuda"):
        OnnxRuntimeBackend(tiny_bundle, device="tpu")  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has a CUDA provider")
def test_cuda_is_refused_where_this_build_has_none(tiny_bundle: Bundle) -> None:
    with pytest.raises(EnvironmentIssue, match=r"no CUDAExecutionProvider.*cclip-deploy\[gpu\]"):
        OnnxRuntimeBackend(tiny_bundle, device="cuda")


def test_a_missing_onnxruntime_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentIssue, match=r"pip install 'cclip-deploy\[cpu\]'"):
        load_onnxruntime("cpu")


def test_a_session_does_not_hold_the_bytes_of_its_model(tiny_bundle: Bundle) -> None:
    """They are as large as the weights, which the session has as well."""
    content = tiny_bundle.read("graphs/mask_decoder.onnx")
    session = make_session(load_onnxruntime("cpu"), content, threads=1)
    assert session.get_inputs()
    assert sys.getrefcount(content) == 2


def test_a_session_that_fell_back_to_the_cpu_raises() -> None:
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    runtime = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *a, **k: fallen)
    with pytest.raises(EnvironmentIssue, match="fell back from cuda"):
        make_session(runtime, b"a graph", "cuda")
