"""`fused` takes its weights from the other graphs of the bundle, from verified bytes and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import external_data_helper

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.export.share_weights import share_weights
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.bundles import copy_of, flip_byte, reseal, store_all_weights
from tests.conftest import THREADS

Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path)


def external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]


def place(tensor: onnx.TensorProto, key: str, value: object) -> None:
    """Set a key of a weight's place in another file."""
    next(entry for entry in tensor.external_data if entry.key == key).value = str(value)


def test_fused_stores_only_what_no_other_graph_has(tiny_bundle: Bundle) -> None:
    graphs = tiny_bundle.path / "graphs"
    sizes = {path.stem: path.stat().st_size for path in graphs.iterdir()}
    assert sizes["fused"] < 0.05 * (sizes["image_encoder"] + sizes["prompt_encoder"])
    for name in ("image_encoder", "prompt_encoder", "mask_decoder"):
        assert external(onnx.load(graphs / f"{name}.onnx", load_external_data=False)) == []


def test_the_weights_are_those_that_onnx_reads(copy: Path) -> None:
    bundle = Bundle.open(copy)
    entry = bundle.graph("fused")
    ours = onnx.load_model_from_string(read_checked(bundle, entry))
    expected = onnx.load(bundle.path / entry.file)
    assert len(expected.graph.initializer) > 50
    for tensor, reference in zip(ours.graph.initializer, expected.graph.initializer, strict=True):
        assert (tensor.name, tensor.dims, tensor.raw_data) == (reference.name, reference.dims, reference.raw_data)
    assert ours.graph.node == expected.graph.node
    assert len(expected.metadata_props) == 2 + len(ours.metadata_props)


def test_other_tools_open_the_file_where_it_lies(tiny_bundle: Bundle) -> None:
    path, rng = tiny_bundle.path / "graphs/fused.onnx", np.random.default_rng(0)
    inputs = {
        "image": rng.standard_normal((2, 3, *tiny_bundle.manifest.image_hw), np.float32),
        "tokens": rng.integers(1, 400, (2, tiny_bundle.manifest.prompt_length), np.int64),
    }
    expected = OnnxRuntimeBackend(tiny_bundle, threads=THREADS).run("fused", inputs)["logits"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["logits"], inputs)[0], expected)
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
    )
    np.testing.assert_allclose(compiled(inputs)["logits"], expected, rtol=1e-4, atol=1e-4)


def test_an_altered_file_of_weights_raises(copy: Path) -> None:
    flip_byte(copy / "graphs/image_encoder.onnx")
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"image_encoder\.onnx was altered"):
        read_checked(bundle, bundle.graph("fused"))


def test_weights_of_another_version_of_the_file_raise(copy: Path) -> None:
    flip_byte(copy / "graphs/image_encoder.onnx")
    reseal(copy)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"fused\.onnx .* another version of 'image_encoder\.onnx'"):
        read_checked(bundle, bundle.graph("fused"))


def _length(tensor: onnx.TensorProto) -> int:
    return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))


def _pin(model: onnx.ModelProto, name: str) -> None:
    model.metadata_props.add(key=f"weights_sha256:{name}", value="0" * 64)
    place(external(model)[0], "location", name)


def _repeat(model: onnx.ModelProto) -> None:
    largest = max(external(model), key=_length)
    for number in range(40):
        model.graph.initializer.append(largest)
        model.graph.initializer[-1].name = f"copy{number}"


FORGED: dict[str, tuple[Change, str]] = {
    "a file that is not pinned": (lambda m: place(external(m)[0], "location", "mask_decoder.onnx"), "does not pin"),
    "a file above the bundle": (lambda m: _pin(m, "../../secret.bin"), "not a graph of the bundle"),
    "an absolute path": (lambda m: _pin(m, "/etc/passwd"), "not a graph of the bundle"),
    "a file that is not a graph": (lambda m: _pin(m, "../manifest.json"), "not a graph of the bundle"),
    "the graph itself": (lambda m: _pin(m, "fused.onnx"), "another version of 'fused.onnx'"),
    "a place after the end": (lambda m: place(external(m)[0], "offset", 10**15), "which is shorter"),
    "a place before the start": (lambda m: place(external(m)[0], "offset", -8), "offset or length '-8'"),
    "an offset of many digits": (lambda m: place(external(m)[0], "offset", "9" * 5000), "offset or length '999"),
    "an offset that is no number": (lambda m: place(external(m)[0], "offset", "٣"), "offset or length '٣'"),
    "a weight of another length": (lambda m: place(external(m)[0], "length", 8), "bytes"),
    "a key that exports do not use": (lambda m: external(m)[0].external_data.add(key="checksum", value="x"), "not as"),
    "a place that is named twice": (lambda m: external(m)[0].external_data.add(key="offset", value="0"), "not as"),
    "a place without a location": (lambda m: external(m)[0].external_data.pop(0), "not as"),
    "own bytes beside the place": (lambda m: setattr(external(m)[0], "raw_data", b"1234"), "twice"),
    "its own bytes in the graph": (lambda m: external(m)[0].ClearField("data_location"), "and its own bytes"),
    "one weight forty times": (_repeat, "longer than the files"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_places_raise(copy: Path, forgery: str) -> None:
    change, reason = FORGED[forgery]
    path = copy / "graphs/fused.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    reseal(copy)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"fused\.onnx is not a graph that cclip-deploy exports") as raised:
        read_checked(bundle, bundle.graph("fused"))
    assert reason in str(raised.value)


def test_bundles_with_all_weights_in_each_graph_still_open(copy: Path) -> None:
    before = OnnxRuntimeBackend(Bundle.open(copy), threads=THREADS)
    inputs = {
        "image": np.ones((1, 3, *Bundle.open(copy).manifest.image_hw), np.float32),
        "tokens": np.full((1, 24), 5, np.int64),
    }
    shared = before.run("fused", inputs)["logits"]
    store_all_weights(copy)
    opened = Bundle.open(copy)
    assert opened.check("graphs/fused.onnx") > opened.check("graphs/image_encoder.onnx")
    np.testing.assert_array_equal(OnnxRuntimeBackend(opened, threads=THREADS).run("fused", inputs)["logits"], shared)


def test_sharing_with_nothing_in_common_changes_no_weight(tiny_bundle_path: Path, tmp_path: Path) -> None:
    for name in ("image_encoder", "mask_decoder"):
        (tmp_path / f"{name}.onnx").write_bytes((tiny_bundle_path / f"graphs/{name}.onnx").read_bytes())
    share_weights(tmp_path / "mask_decoder.onnx", [tmp_path / "image_encoder.onnx"])
    assert onnx.load(tmp_path / "mask_decoder.onnx") == onnx.load(tiny_bundle_path / "graphs/mask_decoder.onnx")
