"""FP16 graphs: types, rejected graphs, and values against float64 and the FP32 graph."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.float16 import FP32_OPS, to_fp16

HALF_STEP = 2.0**-10
NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def elements_by_type(model: onnx.ModelProto) -> Counter[str]:
    """Number of stored weight elements by type."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        name = TensorProto.DataType.Name(tensor.data_type).lower()
        counts[NAMES.get(tensor.data_type, name)] += math.prod(tensor.dims)
    return counts


def make_model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...]],
    opset: int = 18,
) -> onnx.ModelProto:
    """Build a graph with float32 inputs and outputs; an input named tokens is int64."""
    kinds = {"tokens": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def casts(model: onnx.ModelProto) -> int:
    return Counter(node.op_type for node in model.graph.node)["Cast"]


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_inputs_and_outputs_stay_float32_and_tokens_int64() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["words"], name="embed"),
        helper.make_node("Add", ["words", "image"], ["y"], name="add"),
    ]
    model = make_model(nodes, {"table": normal(9, 4)}, {"tokens": (3,), "image": (3, 4)}, {"y": (3, 4)})
    half = to_fp16(model)
    assert {v.name: v.type.tensor_type.elem_type for v in half.graph.input} == {
        "tokens": TensorProto.INT64,
        "image": TensorProto.FLOAT,
    }
    assert half.graph.output[0].name == "y"
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    tokens, image = np.array([1, 8, 1]), np.zeros((3, 4), np.float32)
    (got,) = run(half, tokens=tokens, image=image)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, weight(model, "table")[tokens].astype(np.float16))


def test_a_product_of_small_integers_is_exact() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.integers(-8, 9, (4, 16)).astype(np.float32), rng.integers(-8, 9, (16, 5)).astype(np.float32)
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": right}, {"x": (4, 16)}, {"y": (4, 5)})
    half = to_fp16(model)
    assert types_of(half)["w"] == TensorProto.FLOAT16
    np.testing.assert_array_equal(run(half, x=left)[0], left @ right)


def test_a_convolution_is_within_half_precision_of_float64() -> None:
    x, w = normal(1, 8, 6, 6), normal(4, 8, 1, 1, seed=1)
    model = make_model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": w}, {"x": x.shape}, {"y": (1, 4, 6, 6)})
    exact = np.einsum("bchw,oc->bohw", x.astype(np.float64), w[:, :, 0, 0].astype(np.float64))
    (got,) = run(to_fp16(model), x=x)
    scale = np.einsum("bchw,oc->bohw", abs(x), abs(w[:, :, 0, 0]))
    assert (abs(got - exact) <= 2 * HALF_STEP * scale).all()
    assert abs(got - exact).max() > 1e-5, "nothing was rounded: the graph ran in FP32"


def test_the_given_model_is_not_changed() -> None:
    model = make_model([helper.make_node("Mul", ["x", "w"], ["y"])], {"w": normal(4)}, {"x": (4,)}, {"y": (4,)})
    before = model.SerializeToString()
    to_fp16(model)
    assert model.SerializeToString() == before


def test_fp32_operators_read_and_write_float32() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"], name="product"),
        helper.make_node("Softmax", ["scores"], ["shares"], name="softmax"),
        helper.make_node("LayerNormalization", ["shares", "scale"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "w"], ["y"], name="last"),
    ]
    weights = {"w": normal(8, 8), "scale": normal(8, seed=2)}
    half = to_fp16(make_model(nodes, weights, {"x": (4, 8)}, {"y": (4, 8)}))
    types = types_of(half)
    read = {node.name: {types[name] for name in node.input} for node in half.graph.node}
    assert read["softmax"] == read["norm"] == {TensorProto.FLOAT}
    assert read["product"] == read["last"] == {TensorProto.FLOAT16}
    assert casts(half) == 4, "input, to and from the FP32 operators, output; none between the two FP32 operators"


def test_a_sum_of_squares_that_overflows_float16_stays_float32() -> None:
    assert "ReduceL2" in FP32_OPS
    nodes = [helper.make_node("ReduceL2", ["x", "axes"], ["y"], keepdims=1)]
    model = make_model(nodes, {"axes": np.array([1])}, {"x": (1, 512)}, {"y": (1, 1)})
    (got,) = run(to_fp16(model), x=np.full((1, 512), 20, np.float32))
    np.testing.assert_allclose(got, 20 * 512**0.5, rtol=1e-6)


def test_an_fp32_operator_between_input_and_output_is_not_rounded() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    model = make_model(nodes, {}, {"x": (4, 8)}, {"y": (4, 8)})
    half = to_fp16(model)
    assert casts(half) == 0
    np.testing.assert_array_equal(run(half, x=normal(4, 8))[0], run(model, x=normal(4, 8))[0])


def test_a_cast_is_made_once_for_all_its_readers() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(3)]
    outputs = {f"y{i}": (2, 4) for i in range(3)}
    model = make_model(nodes, {f"w{i}": normal(4, 4, seed=i) for i in range(3)}, {"x": (2, 4)}, outputs)
    assert casts(to_fp16(model)) == 1 + 3


def test_an_output_that_other_nodes_read_is_read_in_half() -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node("Mul", ["y", "w"], ["z"])]
    model = make_model(nodes, {"w": np.full(4, 2, np.float32)}, {"x": (4,)}, {"y": (4,), "z": (4,)})
    half = to_fp16(model)
    assert casts(half) == 3
    y, z = run(half, x=np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(y, [0, 2, 4, 6])
    np.testing.assert_array_equal(z, [0, 4, 8, 12])


def test_a_weight_that_both_types_read_is_stored_in_both() -> None:
    scale = normal(8)
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("LayerNormalization", ["scaled", "scale"], ["y"]),
    ]
    half = to_fp16(make_model(nodes, {"scale": scale}, {"x": (2, 8)}, {"y": (2, 8)}))
    assert elements_by_type(half) == {"fp32": 8, "fp16": 8}
    np.testing.assert_array_equal(weight(half, "scale"), scale)


@pytest.mark.parametrize("as_node", [True, False])
def test_a_resize_keeps_its_scales(as_node: bool) -> None:
    scales = np.array([1, 1, 4 / 3, 4 / 3], np.float32)
    constant = helper.make_node("Constant", [], ["scales"], value=numpy_helper.from_array(scales))
    resize = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")
    nodes = [constant, resize] if as_node else [resize]
    model = make_model(nodes, {} if as_node else {"scales": scales}, {"x": (1, 2, 600, 3)}, {"y": (1, 2, 800, 4)})
    half = to_fp16(model)
    x = np.arange(3600, dtype=np.float32).reshape(1, 2, 600, 3) % 1000
    (got,) = run(half, x=x)
    assert got.shape == (1, 2, 800, 4)
    np.testing.assert_array_equal(got, run(model, x=x)[0])
    resize = next(node for node in half.graph.node if node.op_type == "Resize")
    assert [types_of(half)[name] for name in resize.input if name] == [TensorProto.FLOAT16, TensorProto.FLOAT]


@pytest.mark.parametrize("constant", [{"value_float": 0.5}, {"value_floats": [0.5, 0.5]}])
def test_constants_written_as_attributes_become_half(constant: dict[str, Any]) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **constant), helper.make_node("Mul", ["x", "c"], ["y"])]
    half = to_fp16(make_model(nodes, {}, {"x": (2,)}, {"y": (2,)}))
    assert types_of(half)["c"] == TensorProto.FLOAT16
    np.testing.assert_array_equal(run(half, x=np.array([4, 6], np.float32))[0], [2, 3])


def test_a_cast_from_integers_becomes_a_cast_to_half() -> None:
    nodes = [
        helper.make_node("Cast", ["tokens"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "w"], ["y"]),
    ]
    half = to_fp16(make_model(nodes, {"w": normal(3)}, {"tokens": (3,)}, {"y": (3,)}))
    assert types_of(half)["numbers"] == TensorProto.FLOAT16
    assert casts(half) == 2


def test_an_operator_without_float16_in_its_schema_stays_float32() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["limit"]),
        helper.make_node("Range", ["zero", "limit", "one"], ["steps"]),
        helper.make_node("Mul", ["steps", "w"], ["y"]),
    ]
    scalars = {"zero": np.float32(0), "one": np.float32(1), "w": np.float32(1)}
    weights = {name: np.array(value) for name, value in scalars.items()}
    half = to_fp16(make_model(nodes, weights, {"x": ()}, {"y": ("n",)}))
    np.testing.assert_array_equal(run(half, x=np.array(4, np.float32))[0], [0, 1, 2, 3])


@pytest.mark.parametrize("fill", [-np.inf, np.finfo(np.float32).min])
def test_a_causal_mask_becomes_finite_and_masks_as_before(fill: float) -> None:
    mask = np.triu(np.full((6, 6), fill, np.float32), 1)
    nodes = [helper.make_node("Add", ["x", "mask"], ["scores"]), helper.make_node("Softmax", ["scores"], ["y"])]
    model = make_model(nodes, {"mask": mask}, {"x": (6, 6)}, {"y": (6, 6)})
    half = to_fp16(model)
    assert np.isfinite(weight(half, "mask")).all()
    x = 10 * normal(6, 6)
    (got,) = run(half, x=x)
    assert (got[np.triu_indices(6, 1)] == 0).all()
    np.testing.assert_allclose(got, run(model, x=x)[0], atol=2e-2)


def test_the_value_that_a_mask_selects_becomes_finite() -> None:
    nodes = [helper.make_node("Where", ["keep", "x", "never"], ["y"])]
    weights = {"keep": np.array([True, False]), "never": np.array(-np.inf, np.float32)}
    half = to_fp16(make_model(nodes, weights, {"x": (2,)}, {"y": (2,)}))
    np.testing.assert_array_equal(run(half, x=np.ones(2, np.float32))[0], [1, -30000])


@pytest.mark.parametrize("bad", [65520.0, -1e6, np.inf, np.nan])
def test_a_weight_outside_float16_is_refused_by_name(bad: float) -> None:
    values = np.array([1, bad, 3], np.float32)
    model = make_model(
        [helper.make_node("Mul", ["x", "gain"], ["y"], name="scale")], {"gain": values}, {"x": (3,)}, {"y": (3,)}
    )
    with pytest.raises(ParityError, match=r"'gain' has 1 of 3 values.*65504.*'scale' \(Mul\)"):
        to_fp16(model)
    half = to_fp16(model, fp32_nodes=["scale"])
    np.testing.assert_array_equal(run(half, x=np.ones(3, np.float32))[0], values)


def test_values_at_the_limits_of_float16_are_converted() -> None:
    values = np.array([65519, -65504, 1e-9, -1e-9, 0], np.float32)
    model = make_model([helper.make_node("Mul", ["x", "w"], ["y"])], {"w": values}, {"x": (5,)}, {"y": (5,)})
    expected = np.array([65504, -65504, 2**-24, -(2**-24), 0], np.float16)
    np.testing.assert_array_equal(weight(to_fp16(model), "w"), expected)


def test_an_unknown_fp32_node_is_refused() -> None:
    model = make_model([helper.make_node("Relu", ["x"], ["y"], name="relu")], {}, {"x": (3,)}, {"y": (3,)})
    with pytest.raises(UsageError, match="no node named 'gelu'"):
        to_fp16(model, fp32_nodes=["gelu"])


def test_nodes_without_a_name_get_one() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    names = [node.name for node in to_fp16(make_model(nodes, {}, {"x": (3,)}, {"y": (3,)})).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, (3,))],
    )
    nodes = [helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch, else_branch=branch)]
    model = make_model(nodes, {"flag": np.array(True)}, {"x": (3,)}, {"y": (3,)})
    with pytest.raises(ParityError, match=r"'choice' \(If\) has a subgraph"):
        to_fp16(model)


def test_float_weights_are_converted_and_integers_are_not() -> None:
    weights = {"w": normal(4, 8), "axes": np.array([1])}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("ReduceSum", ["a", "axes"], ["y"])]
    model = make_model(nodes, weights, {"x": (2, 4)}, {"y": (2, 1)})
    assert elements_by_type(to_fp16(model)) == {"fp16": 32, "int64": 1}


def export_attention_net() -> onnx.ModelProto:
    """Trace convolutions, an attention layer and a resize with a dynamic batch."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.attention = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
            self.norm = nn.LayerNorm(width)
            self.last = nn.Conv2d(width, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)  # (B, 32, 8, 8)
            tokens = self.norm(self.attention(x.flatten(2).transpose(1, 2)))  # (B, 64, 32)
            x = tokens.transpose(1, 2).unflatten(2, (8, 8))
            result: torch.Tensor = self.last(nn.functional.interpolate(x, scale_factor=2, mode="bilinear"))
            return result

    torch.manual_seed(0)
    torch.set_num_threads(1)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Net().eval(),
            (torch.randn(2, 3, 16, 16),),
            dynamo=True,
            dynamic_shapes=(batch,),
            input_names=["image"],
            output_names=["logits"],
            opset_version=18,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def test_a_traced_net_needs_few_casts_and_stays_close() -> None:
    model = export_attention_net()
    half = to_fp16(model)
    assert casts(half) == 2 + 2 * 4, "in and out, and two for each of three norms and a softmax"
    assert elements_by_type(half)["fp16"] > 0.99 * elements_by_type(model)["fp32"]
    for batch in (1, 3):
        image = normal(batch, 3, 16, 16)
        (reference,), (got,) = run(model, image=image), run(half, image=image)
        assert got.shape == reference.shape == (batch, 8, 16, 16)
        assert 0 < abs(got - reference).max() < 8 * HALF_STEP * abs(reference).max()
