"""Change a graph's float32 inputs and outputs to float16, for callers that keep float16 tensors on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT, TensorProto.FLOAT16


def io_to_fp16(model: ModelProto) -> ModelProto:
    """Return a graph whose float32 inputs and outputs are float16 under the same names, without redundant casts."""
    import onnx
    from onnx import helper

    halved = onnx.ModelProto()
    halved.CopyFrom(model)
    graph = halved.graph
    nodes = list(graph.node)
    stored = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    first, last = [], []
    for value in graph.input:
        if value.name not in stored and value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _HALF
            renamed[value.name] = f"{value.name}/fp32"
            first.append(helper.make_node("Cast", [value.name], [f"{value.name}/fp32"], to=_FLOAT))
    for value in graph.output:
        if value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _HALF
            renamed[value.name] = f"{value.name}/fp32"
            last.append(helper.make_node("Cast", [f"{value.name}/fp32"], [value.name], to=_HALF))
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del graph.node[:]
    graph.node.extend([*first, *nodes, *last])
    _drop_double_casts(halved)
    onnx.checker.check_model(halved, full_check=True)
    return halved


def _drop_double_casts(model: ModelProto) -> None:
    """Remove casts from float16 to float32 and back; the round trip is exact."""
    from onnx import helper

    types = tensor_types(model, {})
    outputs = {value.name for value in model.graph.output}
    casts = [node for node in model.graph.node if _casts_to(node, _FLOAT) and types.get(node.input[0]) == _HALF]
    half_of = {node.output[0]: node.input[0] for node in casts}
    same: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        is_return = _casts_to(node, _HALF) and node.input[0] in half_of
        if is_return and node.output[0] not in outputs:
            same[node.output[0]] = half_of[node.input[0]]
        elif is_return:
            nodes.append(helper.make_node("Identity", [half_of[node.input[0]]], list(node.output)))
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    read = {name for node in nodes for name in node.input} | outputs
    unread = {name for name in half_of if name not in read}
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if unread.isdisjoint(node.output))


def _casts_to(node: NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)
