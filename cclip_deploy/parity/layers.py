"""Layer-by-layer comparison of a low-precision graph with the FP32 weights that it was made from.

Each layer with learned constants is computed twice from the same inputs, those that the low-precision graph gives it:
once as that graph has it, once with FP32's weights. So errors of earlier layers do not add up, and the limit of one
layer is near the rounding of its weights, however wide the limits of the whole graph's outputs have to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.precision import Precision, product_type

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYER_LIMITS = {"fp16": 4e-3, "bf16": 2.5e-2, "int8": 5e-2, "fp8": 1.5e-1}
"""Largest relative error ‖a−b‖/‖b‖ of one layer's output. Largest seen on sound graphs: docs/decisions/0003."""


@dataclass(frozen=True)
class LayerError:
    """Relative error of one layer's output, given the layer's own inputs."""

    node: str
    op_type: str
    error: float


def layer_limit(precision: Precision) -> float:
    """The largest allowed error of one layer in a precision."""
    return LAYER_LIMITS[product_type(precision)]


def layer_errors(
    model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> list[LayerError]:
    """Errors of all layers with learned constants, in the graph's order.

    Args:
        model: graph of the precision.
        full: FP32 graph that it was made from.
        precision: what `model` is in.
        inputs: arrays by input name.
    """
    import onnx

    from cclip_deploy.graph.precision.rounding import emulate_rounding, has_16_bit_types
    from cclip_deploy.runtime.onnxruntime.cpu import load_onnxruntime, make_session

    shown = onnx.ModelProto()
    shown.CopyFrom(emulate_rounding(model) if has_16_bit_types(model) else model)
    layers = _add_twins(shown, full)
    if not layers:
        return []
    session = make_session(load_onnxruntime("cpu"), shown.SerializeToString(), "cpu", None, precision)
    halves = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
    wanted = {tensor.name for tensor in session.get_inputs()}
    feeds = {n: v.astype(np.float16) if n in halves else v for n, v in inputs.items() if n in wanted}
    names = [name for node in layers for name in (f"{node.name}/distance", f"{node.name}/size")]
    values = iter(session.run(names, feeds))
    return [
        LayerError(node.name, node.op_type, _relative(float(distance), float(size)))
        for node, distance, size in zip(layers, values, values, strict=True)
    ]


def _relative(squared_distance: float, squared_size: float) -> float:
    if squared_size == 0:
        return 0.0 if squared_distance == 0 else float("inf")
    return float(np.sqrt(squared_distance / squared_size))


def _add_twins(shown: ModelProto, full: ModelProto) -> list[NodeProto]:
    """Add to a graph, for each layer, the FP32 layer of the same inputs and both sums of squares."""
    from onnx import NodeProto, helper, numpy_helper

    from cclip_deploy.graph.precision.onnx_graph import float_constants, raise_opset, tensor_types

    opset = next(entry.version for entry in shown.opset_import if entry.domain in ("", "ai.onnx"))
    raised = raise_opset(full, opset)
    constants = dict(float_constants(raised.graph))
    types = tensor_types(raised, constants)
    low = {node.name: node for node in shown.graph.node}
    masks = {name for name, tensor in constants.items() if not np.isfinite(numpy_helper.to_array(tensor)).all()}
    stored: set[str] = set()
    layers = []
    for node in raised.graph.node:
        learned = [name for name in node.input if name in constants]
        if not learned or node.op_type == "Resize" or node.name not in low or types.get(node.output[0]) != 1:
            continue
        if len(low[node.name].input) != len(node.input) or masks.intersection(learned):
            continue
        twin = NodeProto()
        twin.CopyFrom(node)
        twin.name, twin.output[:] = f"{node.name}/twin", [f"{name}/twin" for name in node.output]
        pairs = zip(node.input, low[node.name].input, strict=True)
        twin.input[:] = [f"{name}/full" if name in constants else given for name, given in pairs]
        for name in set(learned) - stored:
            values = numpy_helper.to_array(constants[name])
            shown.graph.initializer.append(numpy_helper.from_array(values, f"{name}/full"))
            stored.add(name)
        mine, theirs = low[node.name].output[0], twin.output[0]
        shown.graph.node.extend([
            twin,
            helper.make_node("Sub", [mine, theirs], [f"{node.name}/difference"]),
            helper.make_node("ReduceSumSquare", [f"{node.name}/difference"], [f"{node.name}/distance"], keepdims=0),
            helper.make_node("ReduceSumSquare", [theirs], [f"{node.name}/size"], keepdims=0),
        ])  # fmt: skip
        shown.graph.output.extend(
            helper.make_tensor_value_info(f"{node.name}/{kind}", 1, []) for kind in ("distance", "size")
        )
        layers.append(node)
    return layers
