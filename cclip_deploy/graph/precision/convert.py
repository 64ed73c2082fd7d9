"""Convert FP32 ONNX graphs to another precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT = 1  # TensorProto.FLOAT
InputsAndOutputs = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class ConvertedGraph:
    """A graph of a precision, with the names of the products that deliberately stay in a higher precision."""

    model: ModelProto
    high_precision: frozenset[str] = frozenset()


def convert_graph(
    model: ModelProto,
    precision: Precision,
    ranges: Mapping[str, float] | None = None,
    high_precision: Collection[str] = (),
    io: InputsAndOutputs = "fp32",
) -> ConvertedGraph:
    """Convert a graph to a precision; `model` is not changed.

    Args:
        model: FP32 graph.
        precision: target precision.
        ranges: for a quantized precision, the range of each tensor that `tensors_to_calibrate` names.
        high_precision: nodes, or blocks such as "neck.masker4" (all products whose weight has that prefix), that stay
            in the precision of the unquantized rest.
        io: type of the graph's float inputs and outputs.

    Raises:
        UsageError: nothing can be quantized, ranges are missing, or a name in `high_precision` matches nothing.
        ParityError: the graph cannot be converted faithfully.
    """
    from cclip_deploy.graph.precision.float16 import to_bf16, to_fp16
    from cclip_deploy.graph.precision.io_types import io_to_fp16

    if precision == "fp32":
        converted = ConvertedGraph(model)
    elif Precision(precision).is_quantized:
        converted = _quantized(model, precision, ranges or {}, high_precision)
    else:
        nodes = products_named(model, high_precision)
        to_16_bits = to_fp16 if precision == "fp16" else to_bf16
        converted = ConvertedGraph(to_16_bits(model, fp32_nodes=nodes), nodes)
    if io == "fp16":
        converted = ConvertedGraph(io_to_fp16(converted.model), converted.high_precision)
    return converted


def tensors_to_calibrate(model: ModelProto) -> tuple[str, ...]:
    """Return the activations whose ranges are needed to quantize this graph; empty if nothing can be quantized."""
    from cclip_deploy.graph.precision.quantize import plan_quantization

    return plan_quantization(model).tensors


def products_named(model: ModelProto, names: Collection[str]) -> frozenset[str]:
    """Return the products with these node names or block names; raise UsageError if a name matches nothing."""
    if unknown := sorted(set(names) - matching(model, names)):
        raise UsageError(
            f"The graph has no convolution, matrix product or block of them named {', '.join(map(repr, unknown))}, so "
            "it cannot stay in a higher precision."
        )
    return frozenset(node.name for node in _products(model) if any(_matches(name, node) for name in names))


def matching(model: ModelProto, names: Collection[str]) -> set[str]:
    """Return those of the names that match a product or a block of this graph."""
    products = _products(model)
    return {name for name in names if any(_matches(name, node) for node in products)}


def product_names(model: ModelProto) -> frozenset[str]:
    """Return the names of the graph's convolutions and matrix products."""
    return frozenset(node.name for node in _products(model))


def high_precision_products(model: ModelProto, full: ModelProto, precision: Precision) -> frozenset[str]:
    """Return the products that a converted graph computes in a higher precision, read from the graph itself.

    Args:
        model: graph of the precision.
        full: FP32 graph from which it was converted.
        precision: precision of `model`.
    """
    from cclip_deploy.graph.precision.onnx_graph import tensor_types
    from cclip_deploy.graph.precision.quantize import plan_quantization

    if Precision(precision).is_quantized:
        producer = {name: node.op_type for node in model.graph.node for name in node.output}
        weights = {p.node: p.weight_input for p in plan_quantization(full).products}
        return frozenset(
            node.name
            for node in model.graph.node
            if node.name in weights and producer.get(node.input[weights[node.name]]) != "DequantizeLinear"
        )
    types, names = tensor_types(model, {}), product_names(full)
    return frozenset(n.name for n in model.graph.node if n.name in names and types.get(n.output[0]) == _FLOAT)


def _products(model: ModelProto) -> list[NodeProto]:
    from cclip_deploy.graph.precision.quantize import PRODUCTS

    return [node for node in model.graph.node if node.op_type in PRODUCTS]


def _matches(name: str, node: NodeProto) -> bool:
    return name == node.name or any(source.startswith(f"{name}.") for source in node.input)


def _quantized(
    model: ModelProto, precision: Precision, ranges: Mapping[str, float], high_precision: Collection[str]
) -> ConvertedGraph:
    from cclip_deploy.graph.precision.float16 import to_fp16
    from cclip_deploy.graph.precision.quantize import plan_quantization, quantize

    plan = plan_quantization(model, products_named(model, high_precision))
    if not plan.products:
        raise UsageError(
            f"Nothing in this graph can be quantized, so it has no {precision} form. Leave it in "
            f"{Precision(precision).rest}."
        )
    kind = Precision(precision).product_type
    quantized = quantize(model, plan, ranges, kind)  # type: ignore[arg-type]  # int8 or fp8
    if Precision(precision).rest == "fp16":
        quantized = to_fp16(quantized)
    return ConvertedGraph(quantized, frozenset(plan.high_precision))
