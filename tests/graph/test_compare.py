"""Two graphs are compared node by node, and each difference names the node and the kind of difference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.graph.compare import differences


def graph() -> onnx.ModelProto:
    """Conv, Relu, QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[0, 0, 0, 0]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequantize"),
    ]
    stored = {
        "w": np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1), "b": np.ones(2, np.float32),
        "s": np.array(0.5, np.float32), "z": np.array(0, np.int8),
    }  # fmt: skip
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", n, 3, 3]) for name, n in (("x", 4), ("y", 2))
    )
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 19)]
    )


def stored(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def test_names_and_documentation_are_not_compared() -> None:
    other = graph()
    other.graph.name, other.doc_string = "another", "text"
    assert list(differences(other, graph())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: stored(m, "w", -np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1)),
         "node 'conv' (Conv): weight 'w': 7 of 8 values differ, first at 1: -1 instead of 1"),
        (lambda m: stored(m, "b", np.zeros(2, np.float32)), "node 'conv' (Conv): weight 'b': 2 of 2"),
        (lambda m: stored(m, "w", np.zeros((2, 4, 1, 1), np.float16)),
         "weight 'w': FLOAT16 (2, 4, 1, 1) instead of FLOAT (2, 4, 1, 1)"),
        (lambda m: stored(m, "s", np.array(1, np.float32)), "node 'quantize' (QuantizeLinear): scale 's': 1 of 1"),
        (lambda m: stored(m, "z", np.array(3, np.int8)), "zero point 'z': 1 of 1 values"),
        (lambda m: m.graph.node[0].attribute[0].ints.__setitem__(0, 1), "node 'conv' (Conv): attribute pads differs"),
        (lambda m: m.graph.node[1].input.__setitem__(0, "x"), "node 'relu' (Relu): inputs are ['x'] instead of ['c']"),
        (lambda m: setattr(m.graph.node[1], "op_type", "Identity"),
         "node 'relu' (Identity): unexpected, instead of 'relu' (Relu)"),
        (lambda m: m.graph.node.pop(), "node 'dequantize' (DequantizeLinear): missing"),
        (lambda m: m.graph.node.append(m.graph.node[1]), "node 'relu' (Relu): unexpected"),
        (lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(1), "more")), "stored tensors: more"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 10), "graph inputs: "),
        (lambda m: setattr(m.opset_import[0], "version", 20), "operator sets: {'': 20} instead of {'': 19}"),
    ],
)  # fmt: skip
def test_each_kind_of_difference_is_named(change: Callable[[onnx.ModelProto], object], message: str) -> None:
    other = graph()
    change(other)
    first = next(differences(other, graph()), "")
    assert message in first
