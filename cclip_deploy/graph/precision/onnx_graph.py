"""Shared queries of ONNX graphs: dependence on inputs, float constants, tensor types, opset conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_FLOAT = 1  # TensorProto.FLOAT
_LARGE = 1024


def varying_tensors(model: ModelProto, integers_only: bool = False) -> set[str]:
    """Return the names of the tensors that depend on a graph input; with `integers_only`, on an integer input."""
    stored = {tensor.name for tensor in model.graph.initializer}
    found = {
        value.name
        for value in model.graph.input
        if value.name not in stored and not (integers_only and value.type.tensor_type.elem_type == _FLOAT)
    }
    for node in model.graph.node:
        if not found.isdisjoint(node.input):
            found.update(name for name in node.output if name)
    return found


def raise_opset(model: ModelProto, version: int) -> ModelProto:
    """Return the graph in opset `version` or newer, by onnx's version converter; large weights are not copied twice.

    Raises:
        ParityError: the version converter rejects the graph.
    """
    import onnx
    from onnx import version_converter

    current = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    raised = onnx.ModelProto()
    if current >= version:
        raised.CopyFrom(model)
        return raised
    bare, weights = _without_large_weights(model)
    try:
        raised = version_converter.convert_version(bare, version)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise ParityError(
            f"The graph of opset {current} cannot be converted to opset {version}: {error}. Export it again."
        ) from error
    names = {tensor.name for tensor in weights}
    inputs = [value for value in raised.graph.input if value.name not in names]
    del raised.graph.input[:]
    raised.graph.input.extend(inputs)
    raised.graph.initializer.extend(weights)
    return raised


def _without_large_weights(model: ModelProto) -> tuple[ModelProto, list[TensorProto]]:
    """Return the graph with its large weights replaced by inputs, and these weights."""
    import math

    import onnx

    bare = onnx.ModelProto(ir_version=max(model.ir_version, 10), opset_import=model.opset_import)
    bare.metadata_props.extend(model.metadata_props)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    bare.graph.value_info.extend(model.graph.value_info)
    weights = []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _LARGE:
            weights.append(tensor)
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(value)
        else:
            bare.graph.initializer.append(tensor)
    return bare, weights


def float_constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield name and tensor of every float32 initializer and Constant node."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == _FLOAT:
            yield tensor.name, tensor
    for node in graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        attribute = node.attribute[0]
        if attribute.name == "value" and attribute.t.data_type == _FLOAT:
            yield node.output[0], numpy_helper.from_array(numpy_helper.to_array(attribute.t), node.output[0])
        elif attribute.name == "value_float":
            yield node.output[0], numpy_helper.from_array(np.array(attribute.f, np.float32), node.output[0])
        elif attribute.name == "value_floats":
            yield node.output[0], numpy_helper.from_array(np.array(attribute.floats, np.float32), node.output[0])


def is_float_constant(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Return whether a node is a Constant that `float_constants` returned."""
    return node.op_type == "Constant" and node.output[0] in constants


def tensor_types(model: ModelProto, constants: dict[str, TensorProto]) -> dict[str, int]:
    """Return the element type of every tensor, by ONNX's type inference on the graph without its weights."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.output.extend(model.graph.output)
    bare.graph.value_info.extend(model.graph.value_info)
    weights = {tensor.name for tensor in model.graph.initializer}
    bare.graph.input.extend(value for value in model.graph.input if value.name not in weights)
    bare.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
    )
    graph = onnx.shape_inference.infer_shapes(bare).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values} | dict.fromkeys(constants, _FLOAT)
    for name in (name for node in model.graph.node for name in node.output if name):
        if not types.get(name):
            raise ParityError(f"The type of tensor {name!r} cannot be inferred, so the graph cannot be converted.")
    return types


def check_convertible(model: ModelProto) -> None:
    """Raise ParityError if a graph has subgraphs, functions, sparse weights or weights in other files."""
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ParityError(
                f"Node {node.name!r} ({node.op_type}) has a subgraph, which the conversion does not support. "
                "Export the graph without control flow."
            )
    if model.functions or model.graph.sparse_initializer:
        raise ParityError("The graph has local functions or sparse weights. Inline or densify them first.")
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            raise ParityError(f"Weight {tensor.name!r} is in another file. Load the graph with its external data.")
