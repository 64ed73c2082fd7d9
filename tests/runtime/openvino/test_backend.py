"""OpenVINO agrees with PyTorch in FP32 and INT8, and sends no telemetry."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, PrecisionNotSupported, UsageError
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.compare import check_graphs
from cclip_deploy.parity.reference import expand, load_references
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import (
    OpenVinoBackend,
    compile_graph,
    describe_device,
    load_openvino,
    read_graph,
)
from cclip_deploy.runtime.pytorch import PyTorchBackend
from tests.bundles import copy_of, digests, reseal


def distance(value: np.ndarray, truth: np.ndarray) -> float:
    """Relative error, in float64."""
    return float(np.linalg.norm(value.astype(np.float64) - truth) / np.linalg.norm(truth.astype(np.float64)))


@pytest.fixture(scope="module")
def backend(tiny_bundle_path: Path) -> OpenVinoBackend:
    """The tiny bundle in OpenVINO, its graphs compiled once."""
    return OpenVinoBackend(Bundle.open(tiny_bundle_path), threads=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_graph_matches_the_plain_network_for_any_batch(
    backend: OpenVinoBackend, tiny_network: CausalCLIPSeg, rows: int
) -> None:
    rng, image_hw = np.random.default_rng(rows), backend.bundle.manifest.image_hw
    image = rng.standard_normal((rows, 3, *image_hw)).astype(np.float32)
    tokens = np.zeros((rows, 24), np.int64)
    tokens[:, 0], tokens[:, 1:4], tokens[:, 4] = 49406, rng.integers(320, 49000, (rows, 3)), 49407
    plain = PyTorchBackend(tiny_network)
    decoder = {
        "features": rng.standard_normal((rows, *image_hw, 32)).astype(np.float32),
        **plain.run("prompt_encoder", {"tokens": np.repeat(tokens, 2, axis=0)}),
    }
    inputs: dict[str, dict[str, np.ndarray]] = {
        "image_encoder": {"image": image},
        "prompt_encoder": {"tokens": tokens},
        "mask_decoder": decoder,
        "fused": {"image": image, "tokens": tokens},
    }
    for graph, arrays in inputs.items():
        answers, truths = backend.run(graph, arrays), plain.run(graph, arrays)
        assert answers.keys() == {output.name for output in backend.bundle.graph(graph).outputs}
        for name, answer in answers.items():
            assert (answer.dtype, answer.shape) == (np.float32, truths[name].shape)
            assert distance(answer, truths[name]) <= 1e-5, (graph, name)


def test_every_graph_is_within_the_float32_limits(backend: OpenVinoBackend) -> None:
    checks = list(check_graphs(backend, backend.bundle.manifest.graphs, load_references(backend.bundle)))
    assert {check.graph for check in checks} >= {"image_encoder", "prompt_encoder", "mask_decoder", "fused", "chain"}
    assert {check.backend for check in checks} == {"openvino"}
    assert [check for check in checks if not check.passed] == []
    assert backend.arithmetic == dict.fromkeys(backend.bundle.manifest.graphs, "fp32")


def test_an_output_is_not_changed_by_later_runs(backend: OpenVinoBackend) -> None:
    inputs = expand(load_references(backend.bundle)[0].decoder_inputs)
    first = backend.run("mask_decoder", inputs)["logits"]
    kept = first.copy()
    for scale in (2, 3):
        backend.run("mask_decoder", {**inputs, "features": inputs["features"] * np.float32(scale)})
        gc.collect()
    np.testing.assert_array_equal(first, kept)


def test_a_single_image_and_larger_batches_use_different_compiled_graphs(
    tiny_bundle: Bundle,
) -> None:
    backend, image = OpenVinoBackend(tiny_bundle, threads=2), load_references(tiny_bundle)[0].image
    backend.load("image_encoder")
    alone = [backend.run("image_encoder", {"image": row[None]})["features"] for row in image]
    sides = [compiled.compiled.input("image").get_partial_shape()[0] for compiled in backend._compiled.values()]
    assert [side.is_static and side.get_length() for side in sides] == [1]
    together = backend.run("image_encoder", {"image": image})["features"]
    sides = [compiled.compiled.input("image").get_partial_shape()[0] for compiled in backend._compiled.values()]
    assert [side.is_static for side in sides] == [True, False]
    assert len(image) > 1
    assert distance(np.concatenate(alone), together) <= 1e-6
    backend.unload("image_encoder")
    assert not backend._compiled


def place_of(array: np.ndarray) -> int:
    """The address of an array's first byte."""
    return int(array.__array_interface__["data"][0])


def test_output_memory_is_reused_only_after_the_output_is_freed(backend: OpenVinoBackend) -> None:
    image = load_references(backend.bundle)[0].image[:1]

    def answer(shift: int) -> np.ndarray:
        return backend.run("image_encoder", {"image": np.roll(image, shift, axis=3)})["features"]

    truths = [answer(shift).copy() for shift in range(5)]
    gc.collect()
    places = {place_of(answer(shift)) for shift in range(4)}
    assert len(places) <= 2  # what is dropped at once costs no new memory
    view = answer(1)[0, 3:]  # the array that it is a part of has no other name
    held = [answer(shift) for shift in range(2, 5)]
    for shift in range(3):
        answer(shift)
    assert len({place_of(array) for array in held}) == 3
    np.testing.assert_array_equal(view, truths[1][0, 3:])
    for array, truth in zip(held, truths[2:], strict=True):
        np.testing.assert_array_equal(array, truth)


def test_threads_get_separate_outputs(backend: OpenVinoBackend) -> None:
    inputs = expand(load_references(backend.bundle)[0].decoder_inputs)
    scales = [np.float32(scale) for scale in range(1, 25)]

    def answer(scale: np.float32) -> np.ndarray:
        given = {**inputs, "kernel": inputs["kernel"] * scale, "tap_bias": inputs["tap_bias"] * scale}
        return backend.run("mask_decoder", {**given, "bias": inputs["bias"] * scale})["logits"].copy()

    truth = answer(np.float32(1))
    with ThreadPoolExecutor(6) as pool:
        for scale, logits in zip(scales, pool.map(answer, scales), strict=True):
            assert distance(logits, truth * scale) <= 1e-5


def test_strided_inputs_are_accepted(backend: OpenVinoBackend) -> None:
    inputs = expand(load_references(backend.bundle)[0].decoder_inputs)
    strided = {name: np.asfortranarray(value) for name, value in inputs.items()}
    answer, truth = (backend.run("mask_decoder", some)["logits"] for some in (strided, inputs))
    np.testing.assert_array_equal(answer, truth)


@pytest.mark.parametrize("channels", [6, 12], ids=["unlike the width", "as many as the width"])
def test_a_bias_a_channel_after_a_product_is_added_along_the_channels(channels: int, tmp_path: Path) -> None:
    """What OpenVINO 2026.4 by itself refuses, or adds along the width, where the batch is dynamic."""
    rng = np.random.default_rng(0)
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 12), (1, channels, 1, 1)))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels, 4, 12])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "p.onnx")
    core, x = load_openvino().Core(), rng.standard_normal((2, channels, 4, 5)).astype(np.float32)
    path = tmp_path / "p.onnx"
    answer = compile_graph(core, read_graph(core, path.read_bytes(), path), threads=1)({"x": x})["y"]
    assert distance(answer, x @ weight + bias) <= 1e-6


def quantized(source: Path, target: Path, images: list[np.ndarray]) -> None:
    """The Q/DQ form of a graph: what goes into a convolution, signed and symmetric, a scale a channel of the weights.

    The one convolution that reads a concatenation stays in float32: OpenVINO 2026.4 moves its Q/DQ pair before the
    concatenation and computes something else (relative error 0.7). ONNX Runtime does not.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"image": image} for image in self.left), None)

    model = onnx.load(source)  # given a path, the quantizer writes a file beside it
    nodes = model.graph.node
    joined = {node.output[0] for node in nodes if node.op_type == "Concat"}
    kept = [node.name for node in nodes if node.op_type == "Conv" and joined & set(node.input)]
    assert len(kept) == 1
    quantize_static(
        model, str(target), Images(), nodes_to_exclude=kept, quant_format=QuantFormat.QDQ,
        per_channel=True, op_types_to_quantize=["Conv"], activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the quantizer's own
def test_an_int8_graph_matches_onnx_runtime_and_is_close_to_float32(
    tiny_bundle_path: Path, backend: OpenVinoBackend, tmp_path: Path
) -> None:
    image = load_references(backend.bundle)[0].image
    quantized(tiny_bundle_path / "graphs" / "image_encoder.onnx", tmp_path / "int8.onnx", [image[:1], image[1:]])
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert kinds.count("QuantizeLinear") > 10
    core = load_openvino().Core()
    path = tmp_path / "int8.onnx"
    compiled = compile_graph(core, read_graph(core, path.read_bytes(), path), "int8", threads=2)
    ours = compiled({"image": image})["features"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # Q/DQ as it is written
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", options)
    theirs = session.run(["features"], {"image": image})[0]
    exact = backend.run("image_encoder", {"image": image})["features"]
    assert 1e-3 < distance(theirs, exact) < 0.3  # it is quantized, and still the same network; its weights are random
    assert distance(ours, theirs) < 0.03
    assert {"i8", "u8"} & set(runs_in(compiled))  # really INT8, not dequantized first
    finer = with_int8(tiny_bundle_path, tmp_path)
    assert 0 < distance(finer.run("image_encoder", {"image": image})["features"], exact) < distance(ours, exact)
    compiled = finer._compiled["image_encoder", False].compiled
    assert sum(kind == "u8" for kind in runs_in(compiled)) > 10


def runs_in(compiled: Any) -> list[str]:
    """What each node of a compiled graph computes in."""
    nodes = compiled.get_runtime_model().get_ops()
    return [str(node.get_rt_info()["runtimePrecision"].astype(str)) for node in nodes]


def with_int8(bundle: Path, folder: Path) -> OpenVinoBackend:
    """A copy of a bundle in OpenVINO, with `int8.onnx` of this folder as its INT8 image encoder."""
    copy, file, record = copy_of(bundle, folder), "graphs/image_encoder.int8.onnx", "calibration/int8.json"
    model = onnx.load(folder / "int8.onnx")
    for tensor in model.graph.initializer:  # as exports write them
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, copy / file)
    (copy / "calibration").mkdir()
    (copy / record).write_text("{}")
    found = digests(copy)

    def add(manifest: dict[str, Any]) -> None:
        source = manifest["graphs"]["image_encoder"]
        made = {"file": file, "sha256": found[file], "precision": "int8", "made_from_sha256": source["sha256"]}
        calibration = {"file": record, "sha256": found[record]}
        manifest["graphs"]["image_encoder.int8"] = {**source, **made, "calibration": calibration}

    reseal(copy, add)
    return OpenVinoBackend(Bundle.open(copy), "int8", threads=2)


def test_threads_and_inference_precision_are_set(backend: OpenVinoBackend, tiny_bundle: Bundle) -> None:
    backend.load("mask_decoder")
    compiled = backend._compiled["mask_decoder", False].compiled
    told = {key: compiled.get_property(key) for key in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "ENABLE_CPU_PINNING")}
    assert told == {"INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    assert "LATENCY" in str(compiled.get_property("PERFORMANCE_HINT")).upper()
    with pytest.raises(UsageError, match="0 threads"):
        OpenVinoBackend(tiny_bundle, threads=0)


def test_the_processor_has_a_name_and_float32() -> None:
    name, *kinds = describe_device()
    assert name
    assert "FP32" in kinds


def test_a_precision_that_the_bundle_lacks_is_named(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no graph 'fused\.fp16'"):
        OpenVinoBackend(tiny_bundle, "fp16").load("fused")


def test_a_missing_openvino_raises_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentIssue, match=r"pip install 'cclip-deploy\[openvino\]'"):
        OpenVinoBackend(tiny_bundle)


def test_both_runtimes_describe_a_graph_alike(tiny_bundle: Bundle, backend: OpenVinoBackend) -> None:
    for graph in tiny_bundle.manifest.graphs:
        backend.load(graph)
        OnnxRuntimeBackend(tiny_bundle, threads=1).load(graph)


WHAT_IS_SENT = """
import json, sys
seen = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "socket.sendto", "os.fork")
sys.addaudithook(lambda event, arguments: seen.append(event) if event in NETWORK else None)
from pathlib import Path
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend, load_openvino
OpenVinoBackend(Bundle.open(Path(sys.argv[1])), threads=1).load("mask_decoder")
import torch
load_openvino().convert_model(torch.nn.Linear(3, 2).eval(), example_input=torch.zeros(1, 3))
import time; time.sleep(0.5)  # openvino-telemetry sends from a thread, which forks
from openvino.tools.ovc import telemetry_utils
print("\\n" + json.dumps([telemetry_utils.tm.__name__, *seen]))
"""


def test_importing_reading_and_converting_sends_nothing(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """As a user who never opted out and has a home to keep a client's id in; any message would go to a dead proxy."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment |= {"HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", WHAT_IS_SENT, str(tiny_bundle_path)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == ["openvino.tools.ovc.telemetry_stub"]
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_openvino_cannot_run_is_refused_before_anything_is_compiled(tiny_bundle: Bundle) -> None:
    with pytest.raises(PrecisionNotSupported, match=r"cannot run int8-fp16 graphs.* Use --backend onnxruntime"):
        OpenVinoBackend(tiny_bundle, "int8-fp16")
