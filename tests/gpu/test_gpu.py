"""What only a machine with an NVIDIA GPU can show; skipped, with the reason, elsewhere. Not yet run anywhere.

`make test-gpu` runs it and writes a results file; CCLIP_GPU_BUNDLE names a bundle with engines that is timed as well.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.benchmark.statistics import summarize
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.compare import check_graphs
from cclip_deploy.parity.reference import expand, load_references, seeded_inputs
from cclip_deploy.runtime.onnxruntime.gpu import OnnxRuntimeGpuBackend
from cclip_deploy.runtime.onnxruntime.session import Device
from cclip_deploy.runtime.registry import BackendConfig, engine_precisions
from cclip_deploy.runtime.tensorrt.binding import BindingName
from cclip_deploy.runtime.tensorrt.device import Gpu, GpuFacts
from cclip_deploy.runtime.tensorrt.open_device import open_gpu
from cclip_deploy.runtime.tensorrt.runner import GpuOptions, TensorRtBackend
from cclip_deploy.runtime.tensorrt.settings import EngineSettings
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.bundles import copy_of, reseal
from tests.conftest import THREADS
from tests.gpu.conftest import BuildOnce
from tests.gpu.machine import binding_reason, gpu_reason, provider_reason
from tests.gpu.results import GpuResults

REASON = gpu_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"needs an NVIDIA GPU: {REASON}")]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8")
BINDINGS: tuple[BindingName, ...] = ("tensorrt-rtx", "tensorrt")
RUNS = 1000
ROOM_BYTES = 8 << 20
"""Free memory may move by this much for reasons that are not ours: other processes, the driver's own pools."""

on_every_binding = pytest.mark.parametrize("binding", BINDINGS)


def inputs_of(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """One picture and one prompt for each graph."""
    image, tokens = seeded_inputs(bundle.manifest.image_hw, bundle.manifest.prompt_length)
    decoder = expand(load_references(bundle)[0].decoder_inputs)
    one = {name: value[:1] for name, value in decoder.items()}
    return {"image_encoder": {"image": image[:1]}, "prompt_encoder": {"tokens": tokens[:1]}, "mask_decoder": one}


@on_every_binding
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_agree_with_pytorch(
    binding: BindingName, precision: Precision, build_once: BuildOnce, results: GpuResults
) -> None:
    found = verify_bundle(build_once(binding, precision), VerifyOptions(threads=THREADS, choice=BackendConfig(binding)))
    for check in found.checks:
        if check.metric in ("relative_error", "mask_dice"):
            results.add(
                "Parity", binding=binding, asked=precision, precision=check.precision, check=check.name,
                metric=check.metric, value=check.value, limit=check.limit, passed=check.passed,
            )  # fmt: skip
    assert {row["ran"] for row in found.ran} == {binding}
    assert [check for check in found.checks if not check.passed] == []


@on_every_binding
@pytest.mark.parametrize("precision", ["fp16", "int8-fp16"])
def test_cuda_graphs_give_the_same_answers(
    binding: BindingName, precision: Precision, build_once: BuildOnce, facts: GpuFacts
) -> None:
    bundle = build_once(binding, precision)
    for graph, arrays in inputs_of(bundle).items():
        with TensorRtBackend(bundle, precision, binding) as plain:
            truth = plain.run(graph, arrays)
        with TensorRtBackend(bundle, precision, binding, GpuOptions(cuda_graphs=True)) as captured:
            for _ in range(4):
                answer = captured.run(graph, arrays)
                for name, value in answer.items():
                    np.testing.assert_array_equal(value, truth[name])
            twice = {name: np.concatenate([value, value]) for name, value in arrays.items()}
            assert all(len(value) == 2 for value in captured.run(graph, twice).values() if graph != "mask_decoder")
            for name, value in captured.run(graph, arrays).items():
                np.testing.assert_array_equal(value, truth[name])


@on_every_binding
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "CUDA graphs"])
def test_a_thousand_runs_take_no_more_memory(
    binding: BindingName, graphs: bool, build_once: BuildOnce, gpu: Gpu, results: GpuResults
) -> None:
    bundle = build_once(binding, "fp16")
    pixels = np.random.default_rng(0).random((80, 70), np.float32)
    with TensorRtBackend(bundle, "fp16", binding, GpuOptions(cuda_graphs=graphs)) as backend:
        segmenter = Segmenter.of_bundle(bundle, backend)
        kernels = segmenter.encode_prompts(["left lung", "both lungs"])
        for _ in range(10):
            segmenter.decode(segmenter.encode_image(pixels), kernels)
        free, ours = gpu.free_bytes(), backend.device_bytes
        for _ in range(RUNS):
            segmenter.decode(segmenter.encode_image(pixels), kernels)
        grown = free - gpu.free_bytes()
        results.add("Memory after 1,000 pictures", binding=binding, cuda_graphs=graphs, grown_bytes=grown)
        assert backend.device_bytes == ours
        assert grown < ROOM_BYTES
    assert open_gpu().free_bytes() >= free


@on_every_binding
def test_features_kept_on_the_device_give_the_same_masks(binding: BindingName, build_once: BuildOnce) -> None:
    bundle = build_once(binding, "fp16")
    arrays = inputs_of(bundle)
    prompt = {name: value for name, value in arrays["mask_decoder"].items() if name != "features"}
    with TensorRtBackend(bundle, "fp16", binding, GpuOptions(lanes=2)) as backend:
        copied = backend.run("image_encoder", arrays["image_encoder"])["features"]
        kept = backend.run_on_device("image_encoder", arrays["image_encoder"], ["features"])["features"]
        np.testing.assert_array_equal(kept.numpy(), copied)
        through_host = backend.run("mask_decoder", {"features": copied, **prompt})["logits"]
        np.testing.assert_array_equal(backend.run("mask_decoder", {"features": kept, **prompt})["logits"], through_host)


@on_every_binding
def test_pycuda_and_cuda_python_give_the_same_answers(binding: BindingName, build_once: BuildOnce) -> None:
    pytest.importorskip("pycuda", reason="pycuda is not installed")
    bundle = build_once(binding, "fp16")
    arrays = inputs_of(bundle)["image_encoder"]
    answers = []
    for interface in ("cuda-python", "pycuda"):
        with TensorRtBackend(bundle, "fp16", binding, GpuOptions(interface)) as backend:  # type: ignore[arg-type]
            answers.append(backend.run("image_encoder", arrays)["features"])
    np.testing.assert_array_equal(*answers)


@on_every_binding
def test_an_engine_for_another_gpu_is_refused(binding: BindingName, build_once: BuildOnce, tmp_path: Path) -> None:
    copy = copy_of(build_once(binding, "fp16").path, tmp_path)

    def for_another(manifest: dict[str, Any]) -> None:
        for engine in manifest["engines"]:
            engine["runs_on"] = {"compute_capabilities": ["7.5"], "and_later": False, "gpu": None}

    reseal(copy, for_another)
    with pytest.raises(EnvironmentIssue, match=r"runs on GPUs of compute capability 7\.5"):
        TensorRtBackend(Bundle.open(copy), "fp16", binding)


@on_every_binding
def test_a_stripped_engine_takes_its_weights_from_the_graph(
    binding: BindingName, facts: GpuFacts, tiny_bundle_path: Path, tmp_path: Path, build_once: BuildOnce
) -> None:
    if reason := binding_reason(binding, facts.compute_capability):
        pytest.skip(reason)
    copy = copy_of(tiny_bundle_path, tmp_path)
    settings = EngineSettings(strip_weights=True)
    build_engines(Bundle.open(copy), BuildOptions("fp16", binding, ("mask_decoder",), threads=1, settings=settings))
    arrays = inputs_of(Bundle.open(copy))["mask_decoder"]
    with TensorRtBackend(Bundle.open(copy), "fp16", binding) as stripped:
        answer = stripped.run("mask_decoder", arrays)["logits"]
    with TensorRtBackend(build_once(binding, "fp16"), "fp16", binding) as whole:
        np.testing.assert_allclose(answer, whole.run("mask_decoder", arrays)["logits"], rtol=1e-3, atol=1e-3)


def test_a_timing_cache_is_written_and_its_hash_kept(facts: GpuFacts, tiny_bundle_path: Path, tmp_path: Path) -> None:
    if reason := binding_reason("tensorrt", facts.compute_capability):
        pytest.skip(reason)
    settings = EngineSettings(timing_cache=tmp_path / "timing.cache")
    hashes = []
    for name in ("first", "second"):
        copy = copy_of(tiny_bundle_path, tmp_path, name)
        options = BuildOptions("fp16", "tensorrt", ("mask_decoder",), threads=1, settings=settings)
        hashes += [entry.timing_cache_sha256 for entry in build_engines(Bundle.open(copy), options)]
    assert hashes[0] is None
    assert hashes[1] is not None


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_onnxruntime_provider_agrees_with_pytorch(
    device: Device, tiny_bundle_path: Path, tmp_path: Path, facts: GpuFacts, results: GpuResults
) -> None:
    if reason := provider_reason(device):
        pytest.skip(reason)
    bundle = Bundle.open(tiny_bundle_path)
    backend = OnnxRuntimeGpuBackend(bundle, "fp32", device, THREADS, cache=tmp_path)
    checks = list(check_graphs(backend, bundle.manifest.graphs, load_references(bundle)))
    for check in checks:
        if check.metric == "relative_error":
            results.add("ONNX Runtime", device=device, check=check.name, value=check.value, limit=check.limit)
    # Providers of TensorRT may use TF32, so the FP16 limit is the one that must hold; for CUDA it is switched off.
    limit = 2e-5 if device == "cuda" else 2e-2
    assert all(check.value <= limit for check in checks if check.metric == "relative_error")


def bundles_to_time(build_once: BuildOnce) -> list[tuple[BindingName, Bundle]]:
    given = os.environ.get("CCLIP_GPU_BUNDLE")
    if given:
        bundle = Bundle.open(Path(given))
        return [(name, bundle) for name in BINDINGS if any(e.backend == name for e in bundle.manifest.engines)]
    return []


@on_every_binding
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-fp16"])
def test_latency_of_the_tiny_network(
    binding: BindingName, precision: Precision, build_once: BuildOnce, results: GpuResults
) -> None:
    time_engines(build_once(binding, precision), binding, precision, results)


def test_latency_of_a_bundle_of_your_own(build_once: BuildOnce, results: GpuResults) -> None:
    found = bundles_to_time(build_once)
    if not found:
        pytest.skip("CCLIP_GPU_BUNDLE names no bundle with engines")
    for binding, bundle in found:
        for precision in engine_precisions(bundle, binding):
            time_engines(bundle, binding, precision, results)


def time_engines(bundle: Bundle, binding: BindingName, precision: str, results: GpuResults, runs: int = 100) -> None:
    """Device time and time with copies, apart; with and without CUDA graphs; the first run, which compiles, apart."""
    for graphs in (False, True):
        with TensorRtBackend(bundle, precision, binding, GpuOptions(cuda_graphs=graphs)) as backend:
            for graph, arrays in inputs_of(bundle).items():
                if graph not in backend.graphs:
                    continue
                started = time.perf_counter()
                backend.run(graph, arrays)
                first_ms = (time.perf_counter() - started) * 1e3
                device = summarize(backend.device_times_ms(graph, arrays, runs))
                whole = []
                for _ in range(runs):
                    started = time.perf_counter()
                    backend.run(graph, arrays)
                    whole.append((time.perf_counter() - started) * 1e3)
                with_copies = summarize(whole)
                results.add(
                    "Latency, one picture or prompt, ms", network=bundle.manifest.model["name"],
                    size="×".join(map(str, bundle.manifest.image_hw)), binding=binding, precision=precision,
                    graph=graph, cuda_graphs=graphs, device_p50=device.p50_ms, device_p99=device.p99_ms,
                    with_copies_p50=with_copies.p50_ms, with_copies_p99=with_copies.p99_ms, first_run=first_ms, n=runs,
                )  # fmt: skip
                assert 0 < device.p50_ms < with_copies.p50_ms


def test_results_can_be_written(results: GpuResults, tmp_path: Path) -> None:
    written = results.write(tmp_path)
    assert json.loads(written[0].read_text())["machine"]["gpu"]
