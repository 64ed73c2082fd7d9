"""Layer-by-layer comparison finds the wrong layer of a low-precision graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cclip_deploy.bundle.bundle import Bundle, edited_bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.engines.convert import ConvertOptions, convert_graphs
from cclip_deploy.errors import ParityError
from cclip_deploy.graph.precision import quantize as quantize
from cclip_deploy.graph.precision.convert import lower
from cclip_deploy.parity.layers import layer_errors, layer_limit
from cclip_deploy.parity.reference import load_references
from cclip_deploy.quantization.calibrate import CalibrationOptions
from tests.bundles import copy_of
from tests.conftest import THREADS, TINY_HW

Array = NDArray[np.float32]
RNG = np.random.default_rng(0)
WEIGHT, BIAS = (RNG.normal(0, 1, shape).astype(np.float32) for shape in ((8, 6), (8,)))


def two_layers(weight: Array = WEIGHT, bias: Array = BIAS) -> onnx.ModelProto:
    """Relu of a product, plus a bias, then a second product."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], name="first", transB=1),
        helper.make_node("Relu", ["g"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
    ]
    stored = {"w": weight, "b": bias, "v": WEIGHT}
    x, y = (helper.make_tensor_value_info(name, 1, ["batch", 6]) for name in "xy")
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )


def test_errors_are_those_of_each_layer_given_its_own_inputs() -> None:
    """An oracle in NumPy, float64."""
    x = RNG.normal(0, 1, (5, 6)).astype(np.float32)
    wrong = WEIGHT * np.float32(1.03)
    first, second = layer_errors(two_layers(wrong), two_layers(), "fp32", {"x": x})
    truth = x.astype(np.float64) @ WEIGHT.T.astype(np.float64) + BIAS
    value = x.astype(np.float64) @ wrong.T.astype(np.float64) + BIAS
    assert (first.node, first.op_type, second.node) == ("first", "Gemm", "second")
    assert first.error == pytest.approx(np.linalg.norm(value - truth) / np.linalg.norm(truth), rel=1e-4)
    assert second.error == 0  # its input is wrong, and it is not


def test_a_layer_that_gives_nan_has_no_error_within_a_limit() -> None:
    wrong = two_layers(np.full_like(WEIGHT, np.nan))
    errors = layer_errors(wrong, two_layers(), "fp32", {"x": np.ones((1, 6), np.float32)})
    assert not errors[0].error <= layer_limit("fp8")


CHANGES: dict[str, Callable[[Array], Array]] = {
    "x 1.03": lambda values: values * np.float32(1.03),
    "negated": lambda values: -values,
    "zeroed": lambda values: values * 0,
    "channels swapped": lambda values: values[[1, 0, *range(2, len(values))]],
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_one_wrong_layer_of_a_network_stands_out(tiny_bundle: Bundle, precision: Precision, name: str) -> None:
    full = onnx.load(tiny_bundle.path / "graphs/image_encoder.onnx")
    wrong = onnx.ModelProto()
    wrong.CopyFrom(full)
    node = [n for n in wrong.graph.node if n.op_type == "Conv"][18]
    tensor = next(t for t in wrong.graph.initializer if t.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(CHANGES[name](numpy_helper.to_array(tensor)), tensor.name))
    inputs = {"image": load_references(tiny_bundle)[1].image[:1]}
    limit = layer_limit(precision)
    found = layer_errors(lower(wrong, precision).model, full, precision, inputs)
    assert [layer.node for layer in found if not layer.error <= limit] == [node.name]


def test_a_conversion_with_a_wrong_weight_writes_nothing(
    tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deriving again would repeat the mistake; the layers' outputs show it when the graph is made."""
    codes = quantize.weight_codes
    seen: list[int] = []

    def third_is_wrong(values: Array, axis: int, kind: quantize.Quantized) -> tuple[Array, Array]:
        seen.append(1)
        weights, scales = codes(values, axis, kind)
        return weights, scales * np.float32(1.5 if len(seen) == 3 else 1)

    write_dataset(tmp_path / "films", {"train": 8}, TINY_HW, 6)
    monkeypatch.setattr(quantize, "weight_codes", third_is_wrong)
    bundle = Bundle.open(copy_of(tiny_bundle_path, tmp_path))
    calibration = CalibrationOptions((tmp_path / "films" / "images",), "min-max")
    options = ConvertOptions("int8", ("image_encoder",), calibration, threads=THREADS)
    with pytest.raises(ParityError, match="'node_conv2d_2'"), edited_bundle(bundle) as folder:
        convert_graphs(bundle, options, folder, lambda _: None)
