"""A graph's float inputs and outputs as float16, for those who feed it from a GPU and want half the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT, TensorProto.FLOAT16


def halve_inputs_and_outputs(model: ModelProto) -> ModelProto:
    """A new graph whose float32 inputs and outputs are float16 of the same names; a cast at each edge, none twice."""
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
    """Take out casts from float16 to float32 and back; both are exact, so nothing changes."""
    from onnx import helper

    types = tensor_types(model, {})
    outputs = {value.name for value in model.graph.output}
    casts = [node for node in model.graph.node if _casts_to(node, _FLOAT) and types.get(node.input[0]) == _HALF]
    half_of = {node.output[0]: node.input[0] for node in casts}
    same: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in model.graph.node:
        is_return = _casts_to(node, _HALF) and node.input[0] in half_of
        if is_return and node.output[0] not in outputs:
            same[node.output[0]] = half_of[node.input[0]]
        elif is_return:
            kept.append(helper.make_node("Identity", [half_of[node.input[0]]], list(node.output)))
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [same.get(name, name) for name in node.input]
    read = {name for node in kept for name in node.input} | outputs
    unread = {name for name in half_of if name not in read}
    del model.graph.node[:]
    model.graph.node.extend(node for node in kept if unread.isdisjoint(node.output))


def _casts_to(node: NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)
