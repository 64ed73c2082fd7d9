"""An FP16 or BF16 graph as ONNX Runtime's CPU has to run it to be believed: FP32 arithmetic, every result rounded.

ONNX Runtime has no bfloat16 convolution on a CPU, and runs float16 ones in float32 with the casts between them taken
out, so that nothing rounds and nothing overflows on the way. Here each tensor that the graph holds in 16 bits is
computed in float32 from rounded inputs and then rounded by a cast and back, which is what a tensor core with a float32
sum does, up to the order of the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _NARROW = 1, (10, 16)  # TensorProto.FLOAT; FLOAT16 and BFLOAT16


def is_narrow(model: ModelProto) -> bool:
    """Whether any tensor of the graph has a float type of 16 bits."""
    return not set(tensor_types(model, {}).values()).isdisjoint(_NARROW)


def emulate_rounding(model: ModelProto) -> ModelProto:
    """The graph in float32, each value rounded where the given graph rounds it; inputs and outputs keep their types."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    narrow = {name: kind for name, kind in tensor_types(model, {}).items() if kind in _NARROW}
    wide = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    wide.graph.name = model.graph.name
    wide.graph.input.extend(model.graph.input)
    wide.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_type in _NARROW:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            wide.graph.initializer.append(numpy_helper.from_array(values, tensor.name))
        else:
            wide.graph.initializer.append(tensor)
    ends = {value.name for value in (*model.graph.input, *model.graph.output) if value.name in narrow}
    for value in model.graph.input:
        if value.name in ends:
            wide.graph.node.append(helper.make_node("Cast", [value.name], [f"{value.name}/wide"], to=_FLOAT))
    for node in model.graph.node:
        wide.graph.node.extend(_with_emulated_rounding(node, narrow, ends))
    return wide


def _with_emulated_rounding(node: NodeProto, narrow: dict[str, int], ends: set[str]) -> list[NodeProto]:
    """The node in float32, and a rounding of each of its outputs that had 16 bits."""
    from onnx import NodeProto, helper

    new = NodeProto()
    new.CopyFrom(node)
    for attribute in new.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _NARROW:
            attribute.i = _FLOAT
    new.input[:] = [f"{name}/wide" if name in ends else name for name in node.input]
    new.output[:] = [f"{name}/unrounded" if name in narrow else name for name in node.output]
    added = []
    for name in (name for name in node.output if name in narrow):
        rounded, back = (name, f"{name}/wide") if name in ends else (f"{name}/rounded", name)
        added.append(helper.make_node("Cast", [f"{name}/unrounded"], [rounded], to=narrow[name]))
        added.append(helper.make_node("Cast", [rounded], [back], to=_FLOAT))
    return [new, *added]
