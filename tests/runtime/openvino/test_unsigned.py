"""Quantization of tensors that are never negative becomes unsigned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.runtime.openvino.backend import compile_graph, load_openvino, read_graph
from cclip_deploy.runtime.openvino.unsigned import use_all_bits

SCALE = 0.03
NEVER_NEGATIVE = {
    "ReLU": [("Relu", ["x"], {})],
    "sigmoid": [("Sigmoid", ["x"], {})],
    "average of a ReLU": [("Relu", ["x"], {}), ("AveragePool", ["0"], {"kernel_shape": [2, 2]})],
    "largest of a ReLU": [("Relu", ["x"], {}), ("MaxPool", ["0"], {"kernel_shape": [2, 2]})],
    "sum of two": [("Relu", ["x"], {}), ("Sigmoid", ["x"], {}), ("Add", ["0", "1"], {})],
    "two joined": [("Relu", ["x"], {}), ("Sigmoid", ["x"], {}), ("Concat", ["0", "1"], {"axis": 1})],
    "product with a positive constant": [("Relu", ["x"], {}), ("Mul", ["0", "up"], {})],
    "transposed ReLU": [("Relu", ["x"], {}), ("Transpose", ["0"], {"perm": [0, 2, 3, 1]})],
}
MAYBE_NEGATIVE = {
    "the input": [("Identity", ["x"], {})],
    "average of the input": [("AveragePool", ["x"], {"kernel_shape": [2, 2]})],
    "ReLU less a constant": [("Relu", ["x"], {}), ("Add", ["0", "down"], {})],
    "ReLU less a ReLU": [("Relu", ["x"], {}), ("Sub", ["up", "0"], {})],
    "ReLU joined with the input": [("Relu", ["x"], {}), ("Concat", ["0", "x"], {"axis": 1})],
    "sigmoid times the input": [("Sigmoid", ["x"], {}), ("Mul", ["0", "x"], {})],
    "ReLU before a convolution": [("Relu", ["x"], {}), ("Conv", ["0", "w"], {})],
}


def graph_of(steps: list[tuple[str, list[str], dict[str, object]]], codes_read: bool = False) -> onnx.ModelProto:
    """The steps, each named by its number and the last `exact`, and a signed pair on it, `y`."""
    nodes = [
        helper.make_node(kind, inputs, ["exact" if number == len(steps) - 1 else str(number)], **attributes)
        for number, (kind, inputs, attributes) in enumerate(steps)
    ]
    nodes.append(helper.make_node("QuantizeLinear", ["exact", "scale", "zero"], ["codes"]))
    nodes.append(helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]))
    outputs = [("exact", TensorProto.FLOAT), ("y", TensorProto.FLOAT)]
    if codes_read:
        outputs.append(("codes", TensorProto.INT8))
    rng = np.random.default_rng(3)
    stored = {
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(0, np.int8),
        "up": np.array(0.7, np.float32),
        "down": np.array(-0.7, np.float32),
        "w": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def run(model: onnx.ModelProto, path: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """How many pairs were changed; the tensor; what the pair made of it."""
    onnx.save(model, path)
    core = load_openvino().Core()
    read = read_graph(core, path.read_bytes(), path)
    changed = use_all_bits(read)
    x = np.random.default_rng(0).normal(0, 2.5, (1, 4, 6, 6)).astype(np.float32)
    answers = compile_graph(core, read, "int8", threads=1)({"x": x})
    return changed, np.array(answers["exact"]), np.array(answers["y"])


def rounded(values: np.ndarray, step: float, least: int, most: int) -> np.ndarray:
    """Values in steps, as the ONNX standard defines a pair, in float64."""
    return np.clip(np.rint(values.astype(np.float64) / step), least, most) * step


@pytest.mark.parametrize("steps", NEVER_NEGATIVE.values(), ids=NEVER_NEGATIVE.keys())
def test_tensors_that_are_never_negative_get_255_steps(
    steps: list[tuple[str, list[str], dict[str, object]]], tmp_path: Path
) -> None:
    changed, exact, y = run(graph_of(steps), tmp_path / "g.onnx")
    assert changed == 1
    np.testing.assert_allclose(y, rounded(exact, SCALE * 127 / 255, 0, 255), atol=1e-6)
    assert np.abs(y - rounded(exact, SCALE, -128, 127)).max() > SCALE / 8  # the signed codes are others
    assert np.abs(y - rounded(exact, SCALE, -128, 127)).max() < 0.76 * SCALE  # half a step of each, no more


@pytest.mark.parametrize("steps", MAYBE_NEGATIVE.values(), ids=MAYBE_NEGATIVE.keys())
def test_tensors_that_may_be_negative_stay_signed(
    steps: list[tuple[str, list[str], dict[str, object]]], tmp_path: Path
) -> None:
    changed, exact, y = run(graph_of(steps), tmp_path / "g.onnx")
    assert changed == 0
    assert exact.min() < 0
    np.testing.assert_allclose(y, rounded(exact, SCALE, -128, 127), atol=1e-6)


def test_quantized_values_with_other_consumers_stay_signed(tmp_path: Path) -> None:
    changed, exact, y = run(graph_of(NEVER_NEGATIVE["ReLU"], codes_read=True), tmp_path / "g.onnx")
    assert changed == 0
    np.testing.assert_allclose(y, rounded(exact, SCALE, -128, 127), atol=1e-6)
