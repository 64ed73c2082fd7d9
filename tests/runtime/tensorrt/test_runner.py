"""The runner computes what the graphs compute, orders its work on streams correctly, and frees all resources."""

from __future__ import annotations

import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.inference.prompt_cache import PromptKernels
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.reference import expand, load_references
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.tensorrt.runner import GpuOptions, TensorRtBackend
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.fake_tensorrt import SCRATCH, FakeTensorRt, engine_bundle


class Setup:
    """A runner on a fake GPU and a fake binding."""

    def __init__(
        self, bundle: Bundle, graphs: bool = False, streams: int = 1, fail: Any = None, **binding: Any
    ) -> None:
        self.bundle = bundle
        self.gpu = FakeGpu(fail)
        self.binding: Any = FakeTensorRt(self.gpu, bundle, **binding)
        self.options = GpuOptions(cuda_graphs=graphs, streams=streams)

    def open(self) -> TensorRtBackend:
        return TensorRtBackend(self.bundle, "fp32", "tensorrt-rtx", self.options, self.gpu, self.binding)


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return engine_bundle(tiny_bundle_path, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def inputs(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """Inputs of each graph, for two images and the prompts of the reference."""
    reference = load_references(bundle)[0]
    image = np.concatenate([reference.image, reference.image[:1]])[:2]
    return {
        "image_encoder": {"image": image},
        "prompt_encoder": {"tokens": reference.tokens},
        "mask_decoder": {name: np.asarray(value) for name, value in expand(reference.decoder_inputs).items()},
    }


@pytest.fixture(scope="module")
def expected(bundle: Bundle, inputs: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Outputs of ONNX Runtime for these inputs."""
    plain = OnnxRuntimeBackend(bundle, threads=2)
    return {graph: plain.run(graph, arrays) for graph, arrays in inputs.items()}


def agree(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "CUDA graphs"])
def test_every_engine_agrees_with_its_graph_in_every_run(
    bundle: Bundle, inputs: Any, expected: Any, graphs: bool
) -> None:
    setup = Setup(bundle, graphs)
    with setup.open() as backend:
        for _ in range(4):
            for graph, arrays in inputs.items():
                agree(backend.run(graph, arrays), expected[graph])
        assert len(setup.binding.contexts) == len(inputs)
    assert setup.gpu.leaks() == {}
    assert setup.gpu.is_closed


def test_outputs_are_not_overwritten_by_the_next_run(bundle: Bundle, inputs: Any, expected: Any) -> None:
    with Setup(bundle).open() as backend:
        first = backend.run("prompt_encoder", inputs["prompt_encoder"])
        backend.run("prompt_encoder", {"tokens": inputs["prompt_encoder"]["tokens"][::-1]})
        agree(first, expected["prompt_encoder"])


def test_memory_stops_growing_after_the_largest_run(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle, graphs=True)
    with setup.open() as backend:
        for arrays in (inputs["image_encoder"], {"image": inputs["image_encoder"]["image"][:1]}):
            backend.run("image_encoder", arrays)
        before = (backend.device_bytes, len(setup.gpu.pinned), setup.gpu.calls.count("allocate"))
        for _ in range(50):
            backend.run("image_encoder", inputs["image_encoder"])
            backend.run("image_encoder", {"image": inputs["image_encoder"]["image"][:1]})
        assert (backend.device_bytes, len(setup.gpu.pinned), setup.gpu.calls.count("allocate")) == before


def test_the_engines_of_a_stream_share_scratch_memory_of_the_largest_size(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        for graph, arrays in inputs.items():
            backend.run(graph, arrays)
        scratch = {context.scratch for context in setup.binding.contexts}
        assert len(scratch) == 1
        assert scratch.pop()[1] == max(SCRATCH.values())
        assert set(setup.binding.strategies) == {"USER_MANAGED"}


def test_features_stay_on_the_device_between_encoder_and_decoder(bundle: Bundle, inputs: Any) -> None:
    setup, plain = Setup(bundle), OnnxRuntimeBackend(bundle, threads=2)
    rng = np.random.default_rng(0)
    pixels = rng.random((50, 70), np.float32)
    with setup.open() as backend:
        segmenter = Segmenter.of_bundle(bundle, backend)
        kernels = segmenter.encode_prompts(["left lung", "both lungs"])
        copies = setup.gpu.calls.count("copy_out")
        features = segmenter.encode_image(pixels)
        assert setup.gpu.calls.count("copy_out") == copies
        logits = segmenter.decode(features, kernels)
        assert setup.gpu.calls.count("copy_out") == copies + 1
        on_cpu = Segmenter.of_bundle(bundle, plain)
        np.testing.assert_allclose(logits, on_cpu.decode(on_cpu.encode_image(pixels), kernels), rtol=1e-4, atol=1e-4)
        assert isinstance(kernels, PromptKernels)
    assert setup.gpu.leaks() == {}


def test_memory_of_device_outputs_is_reused_only_after_they_are_freed(bundle: Bundle, inputs: Any) -> None:
    setup, image = Setup(bundle), inputs["image_encoder"]["image"]
    with setup.open() as backend:
        one = backend.run_on_device("image_encoder", {"image": image[:1]}, ["features"])["features"]
        two = backend.run_on_device("image_encoder", {"image": image[1:]}, ["features"])["features"]
        expected = backend.run("image_encoder", {"image": image})["features"]
        np.testing.assert_allclose(one.numpy(), expected[:1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(two.numpy(), expected[1:], rtol=1e-5, atol=1e-5)
        held = backend.device_bytes
        one.close()
        for _ in range(3):
            three = backend.run_on_device("image_encoder", {"image": image[:1]}, ["features"])["features"]
            np.testing.assert_allclose(three.numpy(), expected[:1], rtol=1e-5, atol=1e-5)
            del three
            gc.collect()
        assert backend.device_bytes == held
        with pytest.raises(UsageError, match="was freed"):
            one.numpy()
        with pytest.raises(UsageError, match="Input features was freed"):
            backend.run("mask_decoder", {**inputs["mask_decoder"], "features": one})
    with pytest.raises(UsageError, match="was freed"):
        two.numpy()
    assert setup.gpu.leaks() == {}


def test_a_graph_is_captured_at_the_second_run_of_a_shape(bundle: Bundle, inputs: Any) -> None:
    setup, tokens = Setup(bundle, graphs=True), inputs["prompt_encoder"]["tokens"]
    with setup.open() as backend:
        seen = []
        for rows in (1, 1, 1, 2, 1, 2, 2, 2):
            bias = backend.run("prompt_encoder", {"tokens": tokens[:rows]})["bias"]
            assert bias.shape == (rows,)
            seen.append((setup.gpu.calls.count("begin_capture"), setup.gpu.calls.count("launch")))
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (2, 4)]
    assert setup.gpu.leaks() == {}


def test_nothing_is_captured_by_default(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        for _ in range(3):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
    assert "begin_capture" not in setup.gpu.calls


def test_an_engine_that_cannot_be_captured_is_reported(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle, graphs=True, capturable=False)
    with setup.open() as backend:
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        with pytest.raises(
            EnvironmentIssue, match=r"TensorRT reports that this engine is not capturable.*--cuda-graphs"
        ):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
    assert setup.gpu.leaks() == {}


def test_the_stream_works_after_a_failed_capture(bundle: Bundle, inputs: Any, expected: Any) -> None:
    setup = Setup(bundle, graphs=True, fail=("end_capture", 1))
    with setup.open() as backend:
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        with pytest.raises(EnvironmentIssue, match=r"prompt_encoder cannot be captured .* injected fault"):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), expected["prompt_encoder"])
    assert setup.gpu.has_failed
    assert setup.gpu.leaks() == {}


@pytest.mark.parametrize(
    "call", ["allocate", "allocate_pinned", "copy_in", "copy_out", "synchronize", "open_stream", "free", "free_pinned",
             "launch", "begin_capture", "close_graph", "close_stream"],
)  # fmt: skip
def test_nothing_leaks_when_any_call_fails(bundle: Bundle, inputs: Any, calls: list[str], call: str) -> None:
    """The first, the middle and the last call of the name fail."""
    count = calls.count(call)
    for nth in {1, (count + 1) // 2, count}:
        setup = Setup(bundle, graphs=True, fail=(call, nth))
        with contextlib.suppress(EnvironmentIssue):
            run_everything(setup, inputs)
        assert setup.gpu.has_failed
        check_leaks(setup.gpu, call)


def run_everything(setup: Setup, inputs: Any) -> None:
    """Run two engines with CUDA graphs and device outputs, then unload one and close."""
    with setup.open() as backend:
        for rows in (1, 1, 1, 2, 2):
            backend.run_on_device("image_encoder", {"image": inputs["image_encoder"]["image"][:rows]}, ["features"])
            backend.run("prompt_encoder", {"tokens": inputs["prompt_encoder"]["tokens"][:rows]})
        backend.unload("image_encoder")


@pytest.fixture(scope="module")
def calls(bundle: Bundle, inputs: Any) -> list[str]:
    """Names of all GPU calls of `run_everything`, if none fails."""
    setup = Setup(bundle, graphs=True)
    run_everything(setup, inputs)
    return setup.gpu.calls


def check_leaks(gpu: FakeGpu, call: str) -> None:
    """At most the resource whose release failed is left."""
    refused = {
        "free": "device memory",
        "free_pinned": "pinned memory",
        "close_graph": "graphs",
        "close_stream": "streams",
    }
    assert gpu.leaks() in ({}, {refused[call]: 1} if call in refused else {})
    assert gpu.is_closed


def test_the_message_of_a_failed_run_is_reported(bundle: Bundle, inputs: Any, expected: Any) -> None:
    setup = Setup(bundle, fail_at_run=1)
    with setup.open() as backend:
        with pytest.raises(EnvironmentIssue, match=r"prompt_encoder could not run\. TensorRT: injected fault"):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), expected["prompt_encoder"])
    assert setup.binding.has_failed
    assert setup.gpu.leaks() == {}


def test_the_smallest_profile_that_fits_is_used(bundle: Bundle, inputs: Any) -> None:
    setup, tokens = Setup(bundle, most=(4, 1)), inputs["prompt_encoder"]["tokens"]
    with setup.open() as backend:
        for rows in (2, 1, 1, 2):
            backend.run("prompt_encoder", {"tokens": tokens[:rows]})
        assert setup.binding.contexts[0].profiles_taken == [1, 0]


def test_shapes_outside_every_profile_are_refused_with_the_range(bundle: Bundle, inputs: Any) -> None:
    with Setup(bundle, most=(2,)).open() as backend:
        rows = np.repeat(inputs["prompt_encoder"]["tokens"][:1], 3, axis=0)
        with pytest.raises(UsageError, match=r"built for tokens \(1, 24\) to \(2, 24\); tokens \(3, 24\) is outside"):
            backend.run("prompt_encoder", {"tokens": rows})
        with pytest.raises(UsageError, match="prompt_encoder takes tokens; words were given"):
            backend.run("prompt_encoder", {"words": rows})


def test_several_threads_run_concurrently_on_their_own_streams(bundle: Bundle, inputs: Any, expected: Any) -> None:
    setup, failures = Setup(bundle, graphs=True, streams=2), []

    def work() -> None:
        try:
            for _ in range(5):
                agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), expected["prompt_encoder"])
        except BaseException as error:
            failures.append(error)

    with setup.open() as backend:
        backend.load("prompt_encoder")
        assert len(setup.binding.contexts) == 2
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert len(setup.binding.deserialized) == 1
    assert setup.gpu.leaks() == {}


def test_features_of_one_stream_are_computed_before_another_reads_them(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle, streams=2)
    with setup.open() as backend:
        image = {"image": inputs["image_encoder"]["image"][:1]}
        decoder = {name: value for name, value in inputs["mask_decoder"].items() if name != "features"}
        features = backend.run_on_device("image_encoder", image, ["features"])["features"]
        with backend.reserve_stream("image_encoder"):  # the stream that computed the features is in use
            logits = backend.run("mask_decoder", {**decoder, "features": features})["logits"]
        plain = OnnxRuntimeBackend(bundle, threads=2)
        expected = plain.run("mask_decoder", {**decoder, "features": plain.run("image_encoder", image)["features"]})
        np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_unloading_frees_an_engine_and_a_later_run_loads_it_again(bundle: Bundle, inputs: Any, expected: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        backend.run("mask_decoder", inputs["mask_decoder"])
        before = backend.device_bytes
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        backend.unload("prompt_encoder")
        assert backend.device_bytes == before - SCRATCH["mask_decoder"] + SCRATCH["prompt_encoder"]
        backend.unload("prompt_encoder")
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), expected["prompt_encoder"])


def test_device_times_exclude_copies(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        assert backend.device_times_ms("prompt_encoder", inputs["prompt_encoder"], 5) == [0.25] * 5
        assert setup.gpu.calls.count("copy_in") == 1
        assert len(setup.binding.runs) == 6
    assert setup.gpu.leaks() == {}


def test_a_closed_backend_refuses_to_run(bundle: Bundle, inputs: Any) -> None:
    backend = Setup(bundle).open()
    backend.close()
    backend.close()
    with pytest.raises(UsageError, match="was closed"):
        backend.run("prompt_encoder", inputs["prompt_encoder"])
    with pytest.raises(UsageError, match="must be 1 to 16, got 0"):
        GpuOptions(streams=0)
