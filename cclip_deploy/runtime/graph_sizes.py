"""Shape inference for the operators of exported graphs, without the onnx package."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from cclip_deploy.runtime.onnx_wire import Graph, GraphError, Node, Tensor
from cclip_deploy.runtime.shape_rules import MOST_VALUES, RULES, Call, Known, Shape

INT64 = 7
ITEM_BYTES = {1: 4, 2: 1, 3: 1, INT64: 8, 10: 2, 16: 2, 17: 1}
"""Bytes per element of a TensorProto.DataType: float32, uint8, int8, int64, float16, bfloat16, float8e4m3fn."""
MOST_AXES, MOST_ELEMENTS = 16, 2**48
"""Limits for a tensor, which bound all numbers in this module."""


def tensor_shapes(graph: Graph, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shape of every tensor of a graph.

    Args:
        graph: from `read_model`.
        inputs: shape of each input, without dynamic dimensions.

    Raises:
        GraphError: an operator has no rule, a shape depends on data or contradicts another, a tensor is computed twice
            or used before it is computed, or a weight has another size than its shape.
    """
    known: dict[str, Known] = {}
    for name, shape in inputs.items():
        _add(known, name, Known(shape))
    for tensor in graph.initializers:
        _add(known, tensor.name, _constant(tensor))
    for node in graph.nodes:
        for name, output in zip(node.outputs, _outputs(node, known), strict=True):
            _add(known, name, output)
    return {name: tensor.shape for name, tensor in known.items()}


def _add(known: dict[str, Known], name: str, tensor: Known) -> None:
    if name in known:
        raise GraphError(f"tensor {name!r} is computed twice")
    if len(tensor.shape) > MOST_AXES or min(tensor.shape, default=0) < 0 or prod(tensor.shape) > MOST_ELEMENTS:
        raise GraphError(f"tensor {name!r} has shape {tensor.shape}")
    known[name] = tensor


def _constant(tensor: Tensor) -> Known:
    if tensor.data_type not in ITEM_BYTES:
        raise GraphError(f"tensor {tensor.name!r} has data type {tensor.data_type}, which exports do not use")
    count = prod(tensor.dims)
    if min(tensor.dims, default=0) < 0 or count * ITEM_BYTES[tensor.data_type] != len(tensor.data):
        raise GraphError(f"tensor {tensor.name!r} of shape {tensor.dims} has {len(tensor.data)} bytes")
    if count > MOST_VALUES or tensor.data_type not in (1, INT64):
        return Known(tensor.dims)
    values = np.frombuffer(tensor.data, "<i8" if tensor.data_type == INT64 else "<f4").tolist()
    return Known(tensor.dims, tuple(values))


def _outputs(node: Node, known: Mapping[str, Known]) -> list[Known]:
    if unknown := [name for name in node.inputs if name and name not in known]:
        raise GraphError(f"{node} uses {unknown[0]!r}, which no earlier node computes")
    if node.op not in RULES:
        raise GraphError(f"{node} has an operator that exports do not use")
    call = Call(node, tuple(known[name] if name else None for name in node.inputs))
    try:
        found = RULES[node.op](call)
    except (GraphError, ArithmeticError, LookupError, ValueError) as error:
        shapes = [tensor and tensor.shape for tensor in call.inputs]
        raise GraphError(f"{node} with inputs {shapes} has no known output shape ({error})") from error
    outputs = found if isinstance(found, list) else [found if isinstance(found, Known) else Known(found)]
    if len(outputs) != len(node.outputs):
        raise GraphError(f"{node} has {len(node.outputs)} outputs")
    return outputs
