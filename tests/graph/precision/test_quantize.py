"""Q/DQ graphs: what is quantized and what is left, how weights are coded, and the numbers they give beside numpy's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.convert import lower, tensors_to_calibrate
from cclip_deploy.graph.precision.float16 import precision_share
from cclip_deploy.graph.precision.quantize import plan_quantization, quantize, scale_of, weight_codes
from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session
from tests.graph.precision.test_float16 import make_model, normal

Ranges = Mapping[str, float]


def residual_model() -> onnx.ModelProto:
    """A stem, an identity block, a downsampling block, attention, a bias of its own, interpolation, a token's scale."""
    weights = {
        "a.weight": normal(8, 8, 1, 1), "a.bias": normal(8, seed=1), "b.weight": normal(8, 8, 1, 1, seed=2),
        "c.weight": normal(8, 8, 1, 1, seed=3), "d.weight": normal(8, 8, 1, 1, seed=4), "rows": np.array([0, 8, -1]),
        "e.weight": normal(16, 8, seed=5), "e.bias": normal(8, seed=6), "up": np.eye(8, 16, dtype=np.float32) / 2,
        "table": normal(9, 16, seed=7), "t.weight": normal(16, 16, seed=8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "a.weight", "a.bias"], ["a"], name="stem"),
        helper.make_node("Relu", ["a"], ["ra"], name="ra"),
        helper.make_node("Conv", ["ra", "b.weight"], ["b"], name="inner"),
        helper.make_node("Add", ["b", "ra"], ["s1"], name="identity"),
        helper.make_node("Relu", ["s1"], ["r1"], name="r1"),
        helper.make_node("AveragePool", ["r1"], ["pool"], name="pool", kernel_shape=[1, 1]),
        helper.make_node("Conv", ["r1", "c.weight"], ["c1"], name="deep1"),
        helper.make_node("Conv", ["c1", "c.weight"], ["c2"], name="deep2"),
        helper.make_node("Conv", ["pool", "d.weight"], ["down"], name="down"),
        helper.make_node("Add", ["down", "c2"], ["s2"], name="downsampling"),
        helper.make_node("Reshape", ["s2", "rows"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "e.weight"], ["e"], name="linear"),
        helper.make_node("Add", ["e", "e.bias"], ["eb"], name="bias"),
        helper.make_node("MatMul", ["eb", "eb"], ["scores"], name="attention"),
        helper.make_node("MatMul", ["scores", "up"], ["risen"], name="interpolation"),
        helper.make_node("Gather", ["table", "tokens"], ["words"], name="words"),
        helper.make_node("MatMul", ["words", "t.weight"], ["kernel"], name="text"),
        helper.make_node("Mul", ["risen", "kernel"], ["y"], name="product"),
    ]
    return make_model(nodes, weights, {"image": (1, 8, 4, 4), "tokens": (8,)}, {"y": (1, 8, 16)})


@pytest.fixture
def model() -> onnx.ModelProto:
    return residual_model()


def unit_ranges(model: onnx.ModelProto) -> dict[str, float]:
    return dict.fromkeys(tensors_to_calibrate(model), 4.0)


def producer(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if tensor in node.output)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto, precision: str, **feeds: np.ndarray) -> np.ndarray:
    session = make_session(load_onnxruntime("cpu"), model.SerializeToString(), "cpu", 1, precision)
    return np.asarray(session.run(None, feeds)[0])


def test_learned_products_are_quantized_and_the_others_left(model: onnx.ModelProto) -> None:
    plan = plan_quantization(model)
    assert [p.node for p in plan.products] == ["stem", "inner", "deep1", "deep2", "down", "linear"]
    assert set(plan.kept) == {"attention", "interpolation", "text"}


def test_the_skip_of_each_residual_sum_has_a_pair_and_nothing_else(model: onnx.ModelProto) -> None:
    """The identity's is what the block began with; a downsampling block's, the branch of fewer products."""
    quantized = quantize(model, plan_quantization(model), unit_ranges(model), "int8")
    for name, skip in (("identity", "ra"), ("downsampling", "down")):
        inputs = list(node_of(quantized, name).input)
        pairs = [producer(quantized, i).op_type == "DequantizeLinear" for i in inputs]
        assert sum(pairs) == 1
        assert inputs[pairs.index(True)] == f"{skip}/dequantized"
    assert list(node_of(quantized, "bias").input) == ["e", "e.bias"]
    assert node_of(quantized, "pool").input[0] == "r1/dequantized"
    assert node_of(quantized, "r1").input[0] == "s1"


def test_every_pair_is_signed_symmetric_and_every_weight_stored_as_codes(model: onnx.ModelProto) -> None:
    quantized = quantize(model, plan_quantization(model), unit_ranges(model), "int8")
    values = stored(quantized)
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and len(node.input) == 3):
            zero = values[node.input[2]]
            assert (zero.dtype, zero.shape, int(zero)) == (np.int8, (), 0)
    for name in ("stem", "inner", "deep1", "deep2", "down", "linear"):
        data, weight = (producer(quantized, i) for i in node_of(quantized, name).input[:2])
        assert (data.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert values[weight.input[0]].dtype == np.int8
    assert node_of(quantized, "stem").input[2] == "a.bias"
    assert values["a.bias"].dtype == np.float32
    assert precision_share(quantized)["int8"] == 4 * 64 + 128 + 1


def test_a_weight_that_two_products_share_is_stored_once(model: onnx.ModelProto) -> None:
    quantized = quantize(model, plan_quantization(model), unit_ranges(model), "int8")
    assert node_of(quantized, "deep1").input[1] == node_of(quantized, "deep2").input[1]
    assert sum(name.startswith("c.weight/int8") and v.dtype == np.int8 for name, v in stored(quantized).items()) == 1


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 3, 3), 0), ((6, 5), 1), ((5, 6), 0)])
def test_int8_codes_are_within_half_a_step_and_fill_the_range(shape: tuple[int, ...], axis: int) -> None:
    values = normal(*shape) * np.exp(normal(shape[axis], seed=1) * 2).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    codes, scales = weight_codes(values, axis, "int8")
    wide = scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert (np.abs(codes * wide - values) <= wide / 2 * 1.0001).all()
    others = tuple(i for i in range(len(shape)) if i != axis)
    assert (np.abs(codes).max(axis=others) >= 126).all()


def test_fp8_codes_are_e4m3_and_never_nan() -> None:
    values = normal(4, 64) * 1000
    codes, scales = weight_codes(values, 0, "fp8")
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    back = codes.astype(np.float32) * scales[:, None]
    assert np.isfinite(back).all()
    assert (np.abs(back - values) <= np.maximum(np.abs(values) / 16 * 1.001, scales[:, None] * 2.0**-9)).all()


@pytest.mark.parametrize("largest", [1e-7, 3e-4, 1.0, 17.3, 5000.0])
def test_a_scale_is_a_float16_that_reaches_the_range(largest: float) -> None:
    scale = scale_of(largest, "int8")
    assert float(np.float16(scale)) == scale
    assert 127 * scale >= largest
    assert scale <= largest / 127 * (1 + 2.0**-9) + 2.0**-24


def test_a_dead_tensor_or_channel_has_a_scale_all_the_same() -> None:
    codes, scales = weight_codes(np.zeros((2, 3), np.float32), 0, "int8")
    assert (codes == 0).all()
    assert (scales > 0).all()


def test_an_int8_product_of_exact_codes_is_exact() -> None:
    """Activations and weights that are whole numbers of steps, the largest 127, lose nothing."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (3, 16)).astype(np.float32), rng.integers(-127, 128, (16, 5)).astype(np.float32)
    x[0, 0], w[0] = 127, 127
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": w}, {"x": (3, 16)}, {"y": (3, 5)}
    )
    quantized = quantize(model, plan_quantization(model), {"x": 127.0}, "int8")
    np.testing.assert_array_equal(run(quantized, "int8", x=x), x @ w)


def test_what_lies_beyond_a_range_is_cut_off_on_both_sides() -> None:
    w = np.full((1, 1), 127.0, np.float32)
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": w}, {"x": (4, 1)}, {"y": (4, 1)}
    )
    quantized = quantize(model, plan_quantization(model), {"x": 1.0}, "int8")
    x = np.array([[-5], [-1], [1], [5]], np.float32)
    got = run(quantized, "int8", x=x)[:, 0] / 127
    np.testing.assert_allclose(got, [-128 / 127, -1, 1, 1], rtol=2e-3)


def fp8_round(values: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("operator", ["Conv", "MatMul"])
def test_an_fp8_graph_computes_what_numpy_does_with_e4m3_operands_relu_included(operator: str) -> None:
    """ONNX Runtime's own optimizer drops a ReLU before an FP8 pair; the session settings must not let it."""
    shape = (1, 8, 2, 2) if operator == "Conv" else (4, 8)
    x, w1, w2 = normal(*shape), normal(8, 8, seed=1), normal(8, 8, seed=2)
    kernel = (8, 8, 1, 1) if operator == "Conv" else (8, 8)
    nodes = [
        helper.make_node(operator, ["x", "w1"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node(operator, ["r", "w2"], ["y"], name="two"),
    ]
    model = make_model(nodes, {"w1": w1.reshape(kernel), "w2": w2.reshape(kernel)}, {"x": shape}, {"y": shape})
    ranges = {"x": 2.0, "r": 5.0}
    got = run(quantize(model, plan_quantization(model), ranges, "fp8"), "fp8", x=x)
    values = x
    for weight, name in ((w1, "x"), (w2, "r")):
        values = fp8_round(values, scale_of(ranges[name], "fp8"))
        codes, scales = weight_codes(weight, 0 if operator == "Conv" else 1, "fp8")
        wide = codes.astype(np.float32) * (scales[:, None] if operator == "Conv" else scales)
        values = np.einsum("oc,bchw->bohw", wide, values) if operator == "Conv" else values @ wide
        values = np.maximum(values, 0) if name == "x" else values
    np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-4)


def test_an_int8_graph_with_an_fp16_rest_keeps_biases_that_onnxruntime_would_round_away() -> None:
    """The product of two tiny float16 scales underflows, so ONNX Runtime must not quantize the bias with it."""
    x, w = normal(1, 8, 2, 2) / 100, normal(8, 8, 1, 1, seed=1) / 1000
    bias = normal(8, seed=2) / 10
    model = make_model(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")],
        {"w": w, "b": bias},
        {"x": x.shape},
        {"y": x.shape},
    )
    lowered = lower(model, "int8-fp16", {"x": float(np.abs(x).max())}).model
    exact = np.einsum("oc,bchw->bohw", w[:, :, 0, 0], x) + bias[:, None, None]
    np.testing.assert_allclose(run(lowered, "int8-fp16", x=x), exact, atol=2e-4)


def test_inputs_and_outputs_stay_and_the_given_model_is_not_changed(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    for precision in ("int8", "fp8", "int8-fp16"):
        lowered = lower(model, precision, unit_ranges(model)).model  # type: ignore[arg-type]
        assert list(lowered.graph.input) == list(model.graph.input)
        assert list(lowered.graph.output) == list(model.graph.output)
    assert model.SerializeToString() == before


def test_nodes_and_blocks_are_kept_out_by_name(model: onnx.ModelProto) -> None:
    kept = lower(model, "int8", unit_ranges(model), keep=["c", "stem"])
    assert kept.kept == {"attention", "interpolation", "text", "deep1", "deep2", "stem"}
    values = stored(kept.model)
    assert values["c.weight"].dtype == np.float32
    assert lower(model, "fp16", keep=["c"]).kept == {"deep1", "deep2"}
    with pytest.raises(UsageError, match=r"named 'neck\.masker9'"):
        lower(model, "int8", unit_ranges(model), keep=["neck.masker9"])


def test_the_rest_is_in_float16_where_asked(model: onnx.ModelProto) -> None:
    lowered = lower(model, "int8-fp16", unit_ranges(model)).model
    types = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    assert types["a.bias"] == TensorProto.FLOAT16
    assert types["ra/scale"] == TensorProto.FLOAT16
    assert types["t.weight"] == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("ranges", "error", "said"),
    [
        ({"image": 1.0}, UsageError, "No range is known for"),
        (None, ParityError, r"range of tensor 'image' is nan"),
    ],
)
def test_ranges_that_are_missing_or_no_numbers_are_refused(
    ranges: Ranges | None, error: type[Exception], said: str, model: onnx.ModelProto
) -> None:
    given: Any = ranges if ranges is not None else {**unit_ranges(model), "image": float("nan")}
    with pytest.raises(error, match=said):
        quantize(model, plan_quantization(model), given, "int8")


def test_a_graph_without_learned_products_is_not_quantized() -> None:
    model = make_model([helper.make_node("MatMul", ["x", "x"], ["y"], name="m")], {}, {"x": (4, 4)}, {"y": (4, 4)})
    assert tensors_to_calibrate(model) == ()
    with pytest.raises(UsageError, match="Nothing of this graph can be quantized"):
        lower(model, "int8", {})


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = np.full((4, 4), np.nan, np.float32)
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": w}, {"x": (4, 4)}, {"y": (4, 4)}
    )
    with pytest.raises(ParityError, match="'w' holds values that are not finite"):
        quantize(model, plan_quantization(model), {"x": 1.0}, "int8")
