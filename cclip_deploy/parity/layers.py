"""Compare the layers of a low-precision graph with the FP32 graph.

Each layer with learned constants is computed twice from the same inputs, those in the low-precision graph: in low
precision, and with FP32 weights. Errors of earlier layers therefore do not accumulate, and the limit for one layer can
be close to the rounding error of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.precision import Precision

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYER_LIMITS = {"fp16": 4e-3, "bf16": 2.5e-2, "int8": 5e-2, "fp8": 1.5e-1}
"""Limits of the relative error ‖a−b‖/‖b‖ of one layer's output; docs/decisions/0003 has measured values."""


@dataclass(frozen=True)
class LayerError:
    """Relative error of one layer's output, given the same inputs."""

    node: str
    op_type: str
    error: float


def layer_limit(precision: Precision) -> float:
    """Return the largest allowed error of a layer in a precision."""
    return LAYER_LIMITS[Precision(precision).product_type]


def layer_errors(
    model: ModelProto, full: ModelProto, precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> list[LayerError]:
    """Return the errors of all layers with learned constants, in graph order.

    Args:
        model: the low-precision graph.
        full: its FP32 graph.
        precision: of `model`.
        inputs: arrays by input name.
    """
    import onnx

    from cclip_deploy.graph.precision.rounding import emulate_rounding, is_narrow
    from cclip_deploy.runtime.graph_model import run_on_cpu

    shown = onnx.ModelProto()
    shown.CopyFrom(emulate_rounding(model) if is_narrow(model) else model)
    layers = _add_fp32_layers(shown, full)
    if not layers:
        return []
    names = [name for node in layers for name in (f"{node.name}/distance", f"{node.name}/size")]
    values = iter(run_on_cpu(shown, names, precision, inputs))
    return [
        LayerError(node.name, node.op_type, _relative(float(distance), float(size)))
        for node, distance, size in zip(layers, values, values, strict=True)
    ]


def _relative(squared_distance: float, squared_size: float) -> float:
    if squared_size == 0:
        return 0.0 if squared_distance == 0 else float("inf")
    return float(np.sqrt(squared_distance / squared_size))


def _add_fp32_layers(shown: ModelProto, full: ModelProto) -> list[NodeProto]:
    """Add to a graph, for each layer, its FP32 layer with the same inputs, and the sums of squares for its error."""
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
        output, truth = low[node.name].output[0], twin.output[0]
        shown.graph.node.extend([
            twin,
            helper.make_node("Sub", [output, truth], [f"{node.name}/difference"]),
            helper.make_node("ReduceSumSquare", [f"{node.name}/difference"], [f"{node.name}/distance"], keepdims=0),
            helper.make_node("ReduceSumSquare", [truth], [f"{node.name}/size"], keepdims=0),
        ])  # fmt: skip
        shown.graph.output.extend(
            helper.make_tensor_value_info(f"{node.name}/{kind}", 1, []) for kind in ("distance", "size")
        )
        layers.append(node)
    return layers
