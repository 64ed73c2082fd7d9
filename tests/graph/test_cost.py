"""Multiply-adds against numbers computed by hand and against PyTorch's counter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.graph.cost import Cost, count_multiply_adds

Dims = Sequence[int | str | None]
Kinds = Mapping[str, int]


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, Dims],
    initializers: Sequence[onnx.TensorProto] = (),
    types: Kinds | None = None,
    output: str = "y",
    domains: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    kinds = types or {}
    values = [helper.make_tensor_value_info(name, kinds.get(name, 1), dims) for name, dims in inputs.items()]
    result = helper.make_tensor_value_info(output, kinds.get(output, 1), None)
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(nodes, "g", values, [result], list(initializers))
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def count_one(op: str, inputs: Mapping[str, Dims], types: Kinds | None = None, **attributes: Any) -> int:
    model = graph_of([helper.make_node(op, list(inputs), ["y"], name="it", **attributes)], inputs, types=types)
    return count_multiply_adds(model, {}).total


def test_a_convolution_with_groups_stride_and_dilation() -> None:
    # 24 x 17 x 12 outputs for each of 2 images, each from 16 / 4 channels of 3 x 5 taps
    count = count_one(
        "Conv", {"x": [2, 16, 32, 24], "w": [24, 4, 3, 5]}, strides=[2, 2], pads=[3, 4, 3, 4], dilations=[2, 2], group=4
    )
    assert count == 2 * 24 * 17 * 12 * 4 * 3 * 5


def test_a_transposed_convolution_counts_from_its_input() -> None:
    count = count_one("ConvTranspose", {"x": [2, 24, 16, 12], "w": [24, 8, 4, 4]}, strides=[2, 2], group=2)
    assert count == 2 * 24 * 16 * 12 * 8 * 4 * 4


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([5, 7], [7, 3], 5 * 7 * 3),
        ([4, 1, 5, 7], [6, 7, 3], 4 * 6 * 5 * 7 * 3),
        ([2, 5, 7], [7, 3], 2 * 5 * 7 * 3),
        ([7], [7, 3], 7 * 3),
        ([2, 5, 7], [7], 2 * 5 * 7),
        ([7], [7], 7),
    ],
)
def test_products_with_broadcasting_and_vectors(a: list[int], b: list[int], expected: int) -> None:
    assert count_one("MatMul", {"a": a, "b": b}) == expected


@pytest.mark.parametrize(("a", "transposed"), [([5, 7], 0), ([7, 5], 1)])
def test_gemm_transposed_or_not(a: list[int], transposed: int) -> None:
    assert count_one("Gemm", {"a": a, "b": [7, 3], "c": [3]}, transA=transposed) == 5 * 7 * 3


@pytest.mark.parametrize(
    ("equation", "a", "b", "expected"),
    [
        ("bnc,bmc->bnm", [2, 5, 7], [2, 3, 7], 2 * 5 * 3 * 7),
        ("i, j -> i j", [5], [3], 15),
        ("ij,jk", [5, 7], [7, 3], 5 * 7 * 3),
    ],
)
def test_einsum_of_two_counts_the_product_of_its_label_sizes(
    equation: str, a: list[int], b: list[int], expected: int
) -> None:
    assert count_one("Einsum", {"a": a, "b": b}, equation=equation) == expected


def test_einsum_of_one_multiplies_nothing() -> None:
    assert count_one("Einsum", {"a": [5, 7]}, equation="ij->j") == 0


@pytest.mark.parametrize(("equation", "inputs"), [("i,i,i->i", "abc"), ("...i,i->...", "ab")])
def test_einsum_without_a_rule_is_an_error_with_the_equation(equation: str, inputs: str) -> None:
    with pytest.raises(DataError, match=r"node 'it' \(Einsum\)") as error:
        count_one("Einsum", {name: [3] for name in inputs}, equation=equation)
    assert equation in str(error.value)


def test_integer_products_and_convolutions_count_like_float_ones() -> None:
    assert count_one("MatMulInteger", {"a": [5, 7], "b": [7, 3]}, {"a": 3, "b": 3, "y": 6}) == 5 * 7 * 3
    conv = {"x": [1, 8, 10, 10], "w": [4, 8, 3, 3]}
    assert count_one("ConvInteger", conv, {"x": 3, "w": 3, "y": 6}) == 4 * 8 * 8 * 8 * 3 * 3


def test_quantized_operators_find_their_second_operand_behind_scale_and_zero_point() -> None:
    scalars: dict[str, Dims] = {"s": [], "z": []}
    kinds = dict.fromkeys(("a", "b", "x", "w", "z", "y"), int(TensorProto.INT8))

    def count(op: str, first: str, second: str, dims: tuple[Dims, Dims]) -> int:
        node = helper.make_node(op, [first, "s", "z", second, "s", "z", "s", "z"], ["y"])
        model = graph_of([node], {first: dims[0], second: dims[1], **scalars}, types=kinds)
        return count_multiply_adds(model, {}).total

    assert count("QLinearMatMul", "a", "b", ([5, 7], [7, 3])) == 5 * 7 * 3
    assert count("QLinearConv", "x", "w", ([1, 8, 10, 10], [4, 8, 3, 3])) == 4 * 8 * 8 * 8 * 3 * 3


def test_a_qdq_graph_counts_its_convolution_once() -> None:
    scale, zero = (
        numpy_helper.from_array(np.array(0.1, np.float32), "s"),
        numpy_helper.from_array(np.array(0, np.int8), "z"),
    )
    weight = numpy_helper.from_array(np.zeros((4, 8, 3, 3), np.int8), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["y"]),
    ]
    model = graph_of(nodes, {"x": ["batch", 8, 10, 10]}, [scale, zero, weight])
    assert count_multiply_adds(model, {"batch": 3}).by_op == {"Conv": 3 * 4 * 8 * 8 * 8 * 9}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=4),
            nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1, groups=2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(16, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Attention(nn.Module):
    """Tokens of a map, heads split and joined by reshapes that need the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 3 * 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2))  # (B, h*w, 36)
        q, k, v = (part.reshape(b, h * w, 4, 3).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        joined = mixed.transpose(1, 2).reshape(b, h * w, 12)
        y: torch.Tensor = self.out(joined)
        return y.transpose(1, 2).reshape(b, 5, h, w)


class Products(nn.Module):
    """Batched product, product with a constant on either side, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(9, 16)), nn.Parameter(torch.randn(24, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.left @ x @ self.right  # (B, 3, 9, 7)
        y = torch.einsum("bcij,bcik->bcjk", y, y)  # (B, 3, 7, 7)
        y = y.flatten(0, 1)
        return torch.bmm(y, y)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Convolutions(), Attention(), Products()])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part in self.parts]


def test_an_exported_network_costs_what_pytorch_counts_at_every_batch_size() -> None:
    torch.set_num_threads(1)
    net = Everything().eval()
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(net, (torch.randn(2, 3, 16, 24),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    for batch in (1, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.randn(batch, 3, 16, 24))
        flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        cost = count_multiply_adds(program.model_proto, {"batch": batch, "prompts": 1})
        assert 2 * (cost.by_op["Conv"] + cost.by_op["ConvTranspose"]) == flops["aten.convolution"]
        assert 2 * cost.total == sum(flops.values())


MATMUL = helper.make_node("MatMul", ["a", "w"], ["y"], name="project")


def test_weights_may_be_absent() -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[65536, 65536])  # would be 16 GiB
    count = count_multiply_adds(graph_of([MATMUL], {"a": ["prompts", 65536]}, [weight]), {"prompts": 2})
    assert count.total == 2 * 65536 * 65536


def test_weights_in_another_file_are_not_read() -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="no-such-file.bin")
    assert count_multiply_adds(graph_of([MATMUL], {"a": [5, 4]}, [weight]), {}).total == 5 * 4 * 3


def test_a_large_constant_node_counts_like_a_weight() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=TensorProto(data_type=1, dims=[4096, 4096]))
    assert count_multiply_adds(graph_of([constant, MATMUL], {"a": [1, 4096]}), {}).total == 4096 * 4096


def test_weights_listed_among_the_inputs_as_old_files_do_need_no_size() -> None:
    weight = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
    model = graph_of([MATMUL], {"a": [5, 4], "w": ["unbound", 3]}, [weight])
    assert count_multiply_adds(model, {}).total == 5 * 4 * 3


def test_the_model_is_not_changed() -> None:
    weight = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
    model = graph_of([MATMUL], {"a": ["batch", 4]}, [weight])
    before = model.SerializeToString()
    count_multiply_adds(model, {"batch": 7})
    assert model.SerializeToString() == before


def test_shapes_computed_in_the_graph_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["a"]),
        MATMUL,
    ]
    rest = numpy_helper.from_array(np.array([-1, 4]), "rest")
    weight = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
    model = graph_of(nodes, {"x": ["batch", 8, 6]}, [rest, weight])
    assert count_multiply_adds(model, {"batch": 5}).by_node[0].output_shape == (5, 12, 3)


def test_stale_shapes_in_the_file_do_not_count() -> None:
    model = graph_of([MATMUL], {"a": ["batch", 4], "w": [4, 3]})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["batch", 99]))
    assert count_multiply_adds(model, {"batch": 5}).total == 5 * 4 * 3


def test_a_call_of_a_local_function_counts_what_is_inside() -> None:
    body = [helper.make_node("MatMul", ["p", "q"], ["r"], name="inner")]
    function = helper.make_function("custom", "Twice", ["p", "q"], ["r"], body, [helper.make_opsetid("", 20)])
    call = helper.make_node("Twice", ["a", "w"], ["y"], domain="custom")
    model = graph_of([call], {"a": [5, 4], "w": [4, 3]}, domains=["custom"], functions=[function])
    assert count_multiply_adds(model, {}).by_op == {"MatMul": 60}


def test_the_cost_is_split_by_operator_with_the_most_expensive_nodes_first() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["f"], name="small"),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["y"], name="large"),
    ]
    cost = count_multiply_adds(graph_of(nodes, {"x": [1, 1, 4, 4], "k": [1, 1, 1, 1], "w": [4, 100]}), {})
    assert cost.by_op == {"MatMul": 1600, "Conv": 16}
    assert [(node.name, node.output_shape, node.multiply_adds) for node in cost.by_node] == [
        ("large", (1, 1, 4, 100), 1600),
        ("small", (1, 1, 4, 4), 16),
    ]
    assert json.loads(json.dumps(cost.to_dict()))["total"] == cost.total == 1616


def test_a_graph_without_products_costs_nothing() -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [3]})
    assert count_multiply_adds(model, {}) == Cost(0, {}, ())


@pytest.mark.parametrize("sizes", [{}, {"prompts": 1}, {"batch": 0}])
def test_a_symbol_without_a_size_is_named(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"Input 'a' has the symbolic size 'batch' on axis 0"):
        count_multiply_adds(graph_of([MATMUL], {"a": ["batch", 4], "w": [4, 3]}), sizes)


def test_an_axis_without_size_and_name_is_named() -> None:
    with pytest.raises(DataError, match=r"Axis 0 of input 'a' has neither a size nor a name"):
        count_multiply_adds(graph_of([MATMUL], {"a": [None, 4], "w": [4, 3]}), {"batch": 1})


def test_a_counted_node_whose_shape_depends_on_values_is_named() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["found"]),
        helper.make_node("Cast", ["found"], ["a"], to=1),
        MATMUL,
    ]
    with pytest.raises(DataError, match=r"multiply-adds of node 'project' \(MatMul\): the shape of '\w'"):
        count_multiply_adds(graph_of(nodes, {"x": [4, 4], "w": [4, 3]}), {})


def test_shapes_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(DataError, match=r"(?s)Shape inference failed for these sizes.*project"):
        count_multiply_adds(graph_of([MATMUL], {"a": ["batch", 5], "w": [4, 3]}), {"batch": 1})


@pytest.mark.parametrize(("op", "domain"), [("LSTM", ""), ("FusedMatMul", "com.microsoft")])
def test_arithmetic_without_a_rule_is_an_error_and_not_zero(op: str, domain: str) -> None:
    node = helper.make_node(op, ["a", "w", "w"], ["y"], name="odd", domain=domain, hidden_size=3)
    model = graph_of([node], {"a": [2, 3, 4], "w": [1, 12, 4]}, domains=[domain] if domain else [])
    with pytest.raises(DataError, match=rf"node 'odd' \({op}\): no rule for"):
        count_multiply_adds(model, {})


def test_products_inside_a_branch_are_an_error_and_not_zero() -> None:
    out = helper.make_tensor_value_info("r", 1, None)
    branch = helper.make_graph([helper.make_node("MatMul", ["a", "w"], ["r"])], "b", [], [out])
    choice = helper.make_node("If", ["c"], ["y"], name="choose", then_branch=branch, else_branch=branch)
    model = graph_of([choice], {"c": [], "a": [5, 4], "w": [4, 3]}, types={"c": TensorProto.BOOL})
    with pytest.raises(DataError, match=r"node 'choose' \(If\): it has MatMul in a subgraph"):
        count_multiply_adds(model, {})
