"""The runner computes what the graphs compute, in an order that CUDA promises, and gives back all that it took."""

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
    """A runner on a GPU and a binding that keep books."""

    def __init__(self, bundle: Bundle, graphs: bool = False, lanes: int = 1, fail: Any = None, **binding: Any) -> None:
        self.bundle = bundle
        self.gpu = FakeGpu(fail)
        self.binding: Any = FakeTensorRt(self.gpu, bundle, **binding)
        self.options = GpuOptions(cuda_graphs=graphs, lanes=lanes)

    def open(self) -> TensorRtBackend:
        return TensorRtBackend(self.bundle, "fp32", "tensorrt-rtx", self.options, self.gpu, self.binding)


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return engine_bundle(tiny_bundle_path, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def inputs(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """Three pictures, three prompts."""
    reference = load_references(bundle)[0]
    image = np.concatenate([reference.image, reference.image[:1]])[:2]
    return {
        "image_encoder": {"image": image},
        "prompt_encoder": {"tokens": reference.tokens},
        "mask_decoder": {name: np.asarray(value) for name, value in expand(reference.decoder_inputs).items()},
    }


@pytest.fixture(scope="module")
def truths(bundle: Bundle, inputs: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """What ONNX Runtime says on its own."""
    plain = OnnxRuntimeBackend(bundle, threads=2)
    return {graph: plain.run(graph, arrays) for graph, arrays in inputs.items()}


def agree(answers: dict[str, np.ndarray], truths: dict[str, np.ndarray]) -> None:
    assert answers.keys() == truths.keys()
    for name, answer in answers.items():
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, truths[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "CUDA graphs"])
def test_every_engine_answers_as_its_graph_run_after_run(
    bundle: Bundle, inputs: Any, truths: Any, graphs: bool
) -> None:
    setup = Setup(bundle, graphs)
    with setup.open() as backend:
        for _ in range(4):
            for graph, arrays in inputs.items():
                agree(backend.run(graph, arrays), truths[graph])
        assert len(setup.binding.contexts) == len(inputs)
    assert setup.gpu.leaks() == {}
    assert setup.gpu.is_closed


def test_an_answer_is_not_overwritten_by_the_next_run(bundle: Bundle, inputs: Any, truths: Any) -> None:
    with Setup(bundle).open() as backend:
        first = backend.run("prompt_encoder", inputs["prompt_encoder"])
        backend.run("prompt_encoder", {"tokens": inputs["prompt_encoder"]["tokens"][::-1]})
        agree(first, truths["prompt_encoder"])


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


def test_the_engines_of_a_lane_share_scratch_memory_of_the_largest_size(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        for graph, arrays in inputs.items():
            backend.run(graph, arrays)
        scratch = {context.scratch for context in setup.binding.contexts}
        assert len(scratch) == 1
        assert scratch.pop()[1] == max(SCRATCH.values())
        assert set(setup.binding.strategies) == {"USER_MANAGED"}


def test_features_stay_on_the_device_between_the_picture_and_its_masks(bundle: Bundle, inputs: Any) -> None:
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
        ours = Segmenter.of_bundle(bundle, plain)
        np.testing.assert_allclose(logits, ours.decode(ours.encode_image(pixels), kernels), rtol=1e-4, atol=1e-4)
        assert isinstance(kernels, PromptKernels)
    assert setup.gpu.leaks() == {}


def test_memory_of_kept_features_is_used_again_and_never_while_they_live(bundle: Bundle, inputs: Any) -> None:
    setup, image = Setup(bundle), inputs["image_encoder"]["image"]
    with setup.open() as backend:
        one = backend.run_on_device("image_encoder", {"image": image[:1]}, ["features"])["features"]
        two = backend.run_on_device("image_encoder", {"image": image[1:]}, ["features"])["features"]
        truth = backend.run("image_encoder", {"image": image})["features"]
        np.testing.assert_allclose(one.numpy(), truth[:1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(two.numpy(), truth[1:], rtol=1e-5, atol=1e-5)
        held = backend.device_bytes
        one.close()
        for _ in range(3):
            three = backend.run_on_device("image_encoder", {"image": image[:1]}, ["features"])["features"]
            np.testing.assert_allclose(three.numpy(), truth[:1], rtol=1e-5, atol=1e-5)
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


def test_a_graph_is_captured_at_the_second_like_run_and_again_when_the_shape_changes(
    bundle: Bundle, inputs: Any
) -> None:
    setup, tokens = Setup(bundle, graphs=True), inputs["prompt_encoder"]["tokens"]
    with setup.open() as backend:
        seen = []
        for rows in (1, 1, 1, 2, 1, 2, 2, 2):
            answer = backend.run("prompt_encoder", {"tokens": tokens[:rows]})["bias"]
            assert answer.shape == (rows,)
            seen.append((setup.gpu.calls.count("begin_capture"), setup.gpu.calls.count("launch")))
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (2, 4)]
    assert setup.gpu.leaks() == {}


def test_without_being_asked_nothing_is_captured(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        for _ in range(3):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
    assert "begin_capture" not in setup.gpu.calls


def test_a_capture_that_cannot_be_says_why(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle, graphs=True, capturable=False)
    with setup.open() as backend:
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        with pytest.raises(EnvironmentIssue, match=r"TensorRT says that this engine is not capturable.*--cuda-graphs"):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
    assert setup.gpu.leaks() == {}


def test_a_capture_that_fails_leaves_a_stream_that_works(bundle: Bundle, inputs: Any, truths: Any) -> None:
    setup = Setup(bundle, graphs=True, fail=("end_capture", 1))
    with setup.open() as backend:
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        with pytest.raises(EnvironmentIssue, match=r"prompt_encoder cannot be captured .* out of luck"):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), truths["prompt_encoder"])
    assert setup.gpu.leaks() == {}


@pytest.mark.parametrize(
    "call", ["allocate", "allocate_pinned", "copy_in", "copy_out", "synchronize", "open_stream", "free", "free_pinned",
             "launch", "begin_capture", "close_graph", "close_stream"],
)  # fmt: skip
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_nothing_leaks_when_any_call_fails(bundle: Bundle, inputs: Any, call: str, nth: int) -> None:
    setup = Setup(bundle, graphs=True, fail=(call, nth))
    with contextlib.suppress(EnvironmentIssue), setup.open() as backend:
        for rows in (1, 1, 1, 2, 2):
            backend.run_on_device("image_encoder", {"image": inputs["image_encoder"]["image"][:rows]}, ["features"])
            backend.run("prompt_encoder", {"tokens": inputs["prompt_encoder"]["tokens"][:rows]})
        backend.unload("image_encoder")
    left = setup.gpu.leaks()
    # What CUDA itself refused to give back is all that may be left.
    refused = {
        "free": "device memory",
        "free_pinned": "pinned memory",
        "close_graph": "graphs",
        "close_stream": "streams",
    }
    assert left in ({}, {refused[call]: 1} if call in refused else {})
    assert setup.gpu.is_closed


def test_a_run_that_tensorrt_refuses_says_what_it_says(bundle: Bundle, inputs: Any, truths: Any) -> None:
    setup = Setup(bundle, fail_at_run=1)
    with setup.open() as backend:
        with pytest.raises(EnvironmentIssue, match=r"prompt_encoder would not run\. TensorRT says: no luck"):
            backend.run("prompt_encoder", inputs["prompt_encoder"])
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), truths["prompt_encoder"])
    assert setup.gpu.leaks() == {}


def test_the_profile_with_the_least_room_that_fits_is_taken(bundle: Bundle, inputs: Any) -> None:
    setup, tokens = Setup(bundle, most=(4, 1)), inputs["prompt_encoder"]["tokens"]
    with setup.open() as backend:
        for rows in (2, 1, 1, 2):
            backend.run("prompt_encoder", {"tokens": tokens[:rows]})
        assert setup.binding.contexts[0].profiles_taken == [1, 0]


def test_what_is_outside_every_profile_is_refused_with_the_range(bundle: Bundle, inputs: Any) -> None:
    with Setup(bundle, most=(2,)).open() as backend:
        rows = np.repeat(inputs["prompt_encoder"]["tokens"][:1], 3, axis=0)
        with pytest.raises(UsageError, match=r"built for tokens \(1, 24\) to \(2, 24\); tokens \(3, 24\) is outside"):
            backend.run("prompt_encoder", {"tokens": rows})
        with pytest.raises(UsageError, match="prompt_encoder takes tokens; words were given"):
            backend.run("prompt_encoder", {"words": rows})


def test_several_threads_run_at_once_each_in_a_lane(bundle: Bundle, inputs: Any, truths: Any) -> None:
    setup, failures = Setup(bundle, graphs=True, lanes=2), []

    def work() -> None:
        try:
            for _ in range(5):
                agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), truths["prompt_encoder"])
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


def test_features_of_one_lane_are_finished_before_another_reads_them(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle, lanes=2)
    with setup.open() as backend:
        image = {"image": inputs["image_encoder"]["image"][:1]}
        decoder = {name: value for name, value in inputs["mask_decoder"].items() if name != "features"}
        features = backend.run_on_device("image_encoder", image, ["features"])["features"]
        with backend._lane("image_encoder"):  # the lane that the features are on is taken
            logits = backend.run("mask_decoder", {**decoder, "features": features})["logits"]
        plain = OnnxRuntimeBackend(bundle, threads=2)
        truth = plain.run("mask_decoder", {**decoder, "features": plain.run("image_encoder", image)["features"]})
        np.testing.assert_allclose(logits, truth["logits"], rtol=1e-4, atol=1e-4)


def test_unloading_frees_an_engine_and_a_later_run_loads_it_again(bundle: Bundle, inputs: Any, truths: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        backend.run("mask_decoder", inputs["mask_decoder"])
        before = backend.device_bytes
        backend.run("prompt_encoder", inputs["prompt_encoder"])
        backend.unload("prompt_encoder")
        assert backend.device_bytes == before - SCRATCH["mask_decoder"] + SCRATCH["prompt_encoder"]
        backend.unload("prompt_encoder")
        agree(backend.run("prompt_encoder", inputs["prompt_encoder"]), truths["prompt_encoder"])


def test_device_times_are_of_the_engine_alone(bundle: Bundle, inputs: Any) -> None:
    setup = Setup(bundle)
    with setup.open() as backend:
        assert backend.device_times_ms("prompt_encoder", inputs["prompt_encoder"], 5) == [0.25] * 5
        assert setup.gpu.calls.count("copy_in") == 1
        assert len(setup.binding.runs) == 6
    assert setup.gpu.leaks() == {}


def test_a_closed_backend_says_so(bundle: Bundle, inputs: Any) -> None:
    backend = Setup(bundle).open()
    backend.close()
    backend.close()
    with pytest.raises(UsageError, match="was closed"):
        backend.run("prompt_encoder", inputs["prompt_encoder"])
    with pytest.raises(UsageError, match="0 lanes"):
        GpuOptions(lanes=0)
