"""BF16 graphs, emulated rounding, and FP16 inputs and outputs, against numpy's rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cclip_deploy.errors import ParityError
from cclip_deploy.graph.precision.float16 import to_bf16, to_fp16
from cclip_deploy.graph.precision.io_types import io_to_fp16
from cclip_deploy.graph.precision.onnx_graph import raise_opset
from cclip_deploy.graph.precision.rounding import emulate_rounding, has_16_bit_types
from tests.graph.precision.test_float16 import elements_by_type, make_model, normal, run, types_of


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def two_products() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["b"], name="two"),
        helper.make_node("Softmax", ["b"], ["y"], name="softmax"),
    ]
    weights = {"w1": normal(8, 8, seed=1), "w2": normal(8, 8, seed=2)}
    return make_model(nodes, weights, {"x": (4, 8)}, {"y": (4, 8)})


def test_a_bf16_graph_has_fp32_inputs_outputs_and_fp32_operators() -> None:
    converted = to_bf16(two_products())
    types = types_of(converted)
    assert (types["a"], types["r"], types["w1"]) == (TensorProto.BFLOAT16,) * 3
    assert (types["x"], types["y"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    softmax = next(node for node in converted.graph.node if node.op_type == "Softmax")
    assert types[softmax.input[0]] == TensorProto.FLOAT
    assert elements_by_type(converted) == {"bf16": 128}
    assert has_16_bit_types(converted)
    assert has_16_bit_types(to_fp16(two_products()))
    assert not has_16_bit_types(two_products())


def test_emulation_rounds_where_bf16_does() -> None:
    """Inputs, weights and every result are rounded to eight bits; sums are not."""
    model, x = two_products(), normal(4, 8)
    w1, w2 = (rounded(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer)
    hidden = np.maximum(rounded(rounded(x) @ w1), 0)
    scores = rounded(hidden @ w2).astype(np.float64)
    exact = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    (got,) = run(emulate_rounding(to_bf16(model)), x=x)
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    assert abs(got - run(model, x=x)[0]).max() > 1e-4, "nothing was rounded"


def test_emulation_overflows_where_fp16_does() -> None:
    """ONNX Runtime on a CPU drops the casts between FP16 operators and would continue with 4 × 100 × 200 = 80000."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("Mul", ["a", "small"], ["y"], name="two"),
    ]
    weights = {"w": np.full((4, 4), 200, np.float32), "small": np.full(1, 2.0**-10, np.float32)}
    half = to_fp16(make_model(nodes, weights, {"x": (4, 4)}, {"y": (4, 4)}))
    x = np.full((4, 4), 100, np.float32)
    assert np.isinf(run(emulate_rounding(half), x=x)[0]).all()
    fitting = run(emulate_rounding(half), x=x / 2)[0]
    np.testing.assert_array_equal(fitting, np.full((4, 4), 40000 / 1024, np.float32).astype(np.float16))


def test_emulation_keeps_fp16_inputs_and_outputs() -> None:
    halved, x = io_to_fp16(to_fp16(two_products())), normal(4, 8).astype(np.float16)
    (got,) = run(emulate_rounding(halved), x=x)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, run(two_products(), x=x.astype(np.float32))[0], atol=2e-3)


def test_a_bf16_weight_has_the_range_of_float32_and_must_be_finite() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")]
    large = make_model(nodes, {"w": np.full((4, 4), 1e30, np.float32)}, {"x": (4, 4)}, {"y": (4, 4)})
    assert np.isfinite(run(emulate_rounding(to_bf16(large)), x=np.ones((4, 4), np.float32))[0]).all()
    broken = make_model(nodes, {"w": np.full((4, 4), np.inf, np.float32)}, {"x": (4, 4)}, {"y": (4, 4)})
    with pytest.raises(ParityError, match="bfloat16 cannot represent"):
        to_bf16(broken)


def test_a_mask_of_minus_infinity_becomes_finite_in_bf16_too() -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["s"], name="add"),
        helper.make_node("Softmax", ["s"], ["y"], name="softmax"),
    ]
    converted = to_bf16(make_model(nodes, {"mask": mask}, {"x": (4, 4)}, {"y": (4, 4)}))
    values = onnx.numpy_helper.to_array(converted.graph.initializer[0]).astype(np.float32)
    assert np.isfinite(values).all()
    (got,) = run(emulate_rounding(converted), x=np.zeros((4, 4), np.float32))
    np.testing.assert_allclose(got, np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None], rtol=1e-2)


def test_a_raised_opset_keeps_nodes_weights_and_outputs() -> None:
    model, x = two_products(), normal(4, 8)
    large = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": normal(64, 64)}, {"x": (2, 64)}, {"y": (2, 64)}
    )
    for source, given in ((model, x), (large, normal(2, 64, seed=3))):
        raised = raise_opset(source, 22)
        assert raised.opset_import[0].version == 22
        assert [n.name for n in raised.graph.node] == [n.name for n in source.graph.node]
        assert [v.name for v in raised.graph.input] == ["x"]
        np.testing.assert_array_equal(run(raised, x=given)[0], run(source, x=given)[0])


@pytest.mark.parametrize("convert", [to_fp16, lambda model: model])
def test_inputs_and_outputs_become_fp16_without_redundant_casts(convert: object) -> None:
    model, x = convert(two_products()), normal(4, 8)  # type: ignore[operator]
    halved = io_to_fp16(model)
    types = types_of(halved)
    assert (types["x"], types["y"]) == (TensorProto.FLOAT16, TensorProto.FLOAT16)
    half = x.astype(np.float16)
    (got,) = run(halved, x=half)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, run(model, x=half.astype(np.float32))[0].astype(np.float16), rtol=2e-3)
    casts = [(types[n.input[0]], types[n.output[0]]) for n in halved.graph.node if n.op_type == "Cast"]
    readers = {name for node in halved.graph.node for name in node.input}
    assert all(n.output[0] in readers | {"y"} for n in halved.graph.node)
    if convert is to_fp16:
        assert casts == [(10, 1), (1, 10)]  # into the FP32 softmax, and at the graph's output
