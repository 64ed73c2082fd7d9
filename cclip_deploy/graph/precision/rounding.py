"""Emulate 16-bit rounding of an FP16 or BF16 graph in FP32 on a CPU.

ONNX Runtime has no bfloat16 convolution on a CPU, and computes float16 graphs in float32 without the casts in between,
so that nothing rounds or overflows. Here each 16-bit tensor is computed in float32 from rounded inputs and then rounded
by a cast to 16 bits and back. A tensor core with a float32 accumulator computes the same, up to the order of the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.graph.precision.onnx_graph import tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _SIXTEEN_BITS = 1, (10, 16)  # TensorProto.FLOAT; FLOAT16 and BFLOAT16


def has_16_bit_types(model: ModelProto) -> bool:
    """Return whether any tensor of the graph has a 16-bit float type."""
    return not set(tensor_types(model, {}).values()).isdisjoint(_SIXTEEN_BITS)


def emulate_rounding(model: ModelProto) -> ModelProto:
    """Return the graph in float32 with each 16-bit value rounded; inputs and outputs keep their types."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    rounded_types = {name: kind for name, kind in tensor_types(model, {}).items() if kind in _SIXTEEN_BITS}
    emulated = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    emulated.graph.name = model.graph.name
    emulated.graph.input.extend(model.graph.input)
    emulated.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_type in _SIXTEEN_BITS:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            emulated.graph.initializer.append(numpy_helper.from_array(values, tensor.name))
        else:
            emulated.graph.initializer.append(tensor)
    ends = {value.name for value in (*model.graph.input, *model.graph.output) if value.name in rounded_types}
    for value in model.graph.input:
        if value.name in ends:
            emulated.graph.node.append(helper.make_node("Cast", [value.name], [f"{value.name}/emulated"], to=_FLOAT))
    for node in model.graph.node:
        emulated.graph.node.extend(_with_emulated_rounding(node, rounded_types, ends))
    return emulated


def _with_emulated_rounding(node: NodeProto, rounded_types: dict[str, int], ends: set[str]) -> list[NodeProto]:
    """Return the node in float32, followed by the rounding of each of its 16-bit outputs."""
    from onnx import NodeProto, helper

    new = NodeProto()
    new.CopyFrom(node)
    for attribute in new.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _SIXTEEN_BITS:
            attribute.i = _FLOAT
    new.input[:] = [f"{name}/emulated" if name in ends else name for name in node.input]
    new.output[:] = [f"{name}/unrounded" if name in rounded_types else name for name in node.output]
    added = []
    for name in (name for name in node.output if name in rounded_types):
        rounded, back = (name, f"{name}/emulated") if name in ends else (f"{name}/rounded", name)
        added.append(helper.make_node("Cast", [f"{name}/unrounded"], [rounded], to=rounded_types[name]))
        added.append(helper.make_node("Cast", [rounded], [back], to=_FLOAT))
    return [new, *added]
