"""A BF16 graph in a form that ONNX Runtime's CPU runs: FP32 arithmetic with BF16's rounding at the same places.

ONNX Runtime has no bfloat16 convolution on a CPU. Each tensor that the BF16 graph holds in bfloat16 is computed in
float32 from rounded inputs and then rounded by a cast to bfloat16 and back, which is what a tensor core with a float32
sum does, up to the order of the sum. Weights are rounded already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.graph.flat import tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _BFLOAT16 = 1, 16  # TensorProto.FLOAT, TensorProto.BFLOAT16


def holds_bf16(model: ModelProto) -> bool:
    """Whether any weight or cast of the graph is bfloat16."""
    if any(tensor.data_type == _BFLOAT16 for tensor in model.graph.initializer):
        return True
    return any(_cast_type(node) == _BFLOAT16 for node in model.graph.node)


def widen_bf16(model: ModelProto) -> ModelProto:
    """The graph with float32 in bfloat16's place, each value rounded where the given graph rounds it."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    types = tensor_types(model, {})
    wide = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    wide.graph.name = model.graph.name
    wide.graph.input.extend(model.graph.input)
    wide.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_type == _BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            wide.graph.initializer.append(numpy_helper.from_array(values, tensor.name))
        else:
            wide.graph.initializer.append(tensor)
    for node in model.graph.node:
        wide.graph.node.extend(_widened(node, {name for name in node.output if types.get(name) == _BFLOAT16}))
    return wide


def _widened(node: NodeProto, rounded: set[str]) -> list[NodeProto]:
    """The node in float32, and a rounding of each of its outputs that was bfloat16."""
    from onnx import NodeProto, helper

    new = NodeProto()
    new.CopyFrom(node)
    if _cast_type(node) == _BFLOAT16:
        next(attribute for attribute in new.attribute if attribute.name == "to").i = _FLOAT
    new.output[:] = [f"{name}/unrounded" if name in rounded else name for name in node.output]
    added = []
    for name in node.output:
        if name in rounded:
            narrow = helper.make_node("Cast", [f"{name}/unrounded"], [f"{name}/bfloat16"], to=_BFLOAT16)
            added += [narrow, helper.make_node("Cast", [f"{name}/bfloat16"], [name], to=_FLOAT)]
    return [new, *added]


def _cast_type(node: NodeProto) -> int | None:
    if node.op_type != "Cast":
        return None
    return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
