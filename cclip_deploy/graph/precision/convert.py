"""One door to every precision: an FP32 graph and what is known of its activations become the graph of a precision."""

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
    """A graph of a precision, and the names of the products that it keeps in a higher one on purpose."""

    model: ModelProto
    kept: frozenset[str] = frozenset()


def lower(
    model: ModelProto,
    precision: Precision,
    ranges: Mapping[str, float] | None = None,
    keep: Collection[str] = (),
    io: InputsAndOutputs = "fp32",
) -> ConvertedGraph:
    """The graph in a precision; `model`, FP32, is not changed.

    Args:
        model: FP32 graph.
        precision: fp16, bf16, or a quantized one.
        ranges: for a quantized precision, the range of each tensor that `tensors_to_calibrate` names.
        keep: nodes, or blocks such as "neck.masker4" (all products whose weight's name begins so), that stay in what
            the rest of the network runs in.
        io: the type of the graph's float inputs and outputs.

    Raises:
        UsageError: nothing of the graph can be quantized, ranges are missing, or `keep` names nothing.
        ParityError: the graph cannot be converted faithfully.
    """
    from cclip_deploy.graph.precision.float16 import to_bf16, to_fp16
    from cclip_deploy.graph.precision.io_types import halve_inputs_and_outputs

    if precision == "fp32":
        lowered = ConvertedGraph(model)
    elif Precision(precision).is_quantized:
        lowered = _quantized(model, precision, ranges or {}, keep)
    else:
        nodes = named_products(model, keep)
        narrow = to_fp16 if precision == "fp16" else to_bf16
        lowered = ConvertedGraph(narrow(model, fp32_nodes=nodes), nodes)
    if io == "fp16":
        lowered = ConvertedGraph(halve_inputs_and_outputs(lowered.model), lowered.kept)
    return lowered


def tensors_to_calibrate(model: ModelProto) -> tuple[str, ...]:
    """The activations whose ranges a quantized form of this graph needs; none where nothing can be quantized."""
    from cclip_deploy.graph.precision.quantize import plan_quantization

    return plan_quantization(model).tensors


def named_products(model: ModelProto, keep: Collection[str]) -> frozenset[str]:
    """The products that `keep` names: by the node's own name, or by the block that its weights belong to.

    UsageError where a name names nothing.
    """
    if unknown := sorted(set(keep) - matching(model, keep)):
        raise UsageError(
            f"The graph has no convolution, matrix product or block of them named {', '.join(map(repr, unknown))}, so "
            "it cannot be kept in a higher precision."
        )
    return frozenset(node.name for node in _products(model) if any(_names(name, node) for name in keep))


def matching(model: ModelProto, keep: Collection[str]) -> set[str]:
    """Those of the names that name a product or a block of this graph."""
    products = _products(model)
    return {name for name in keep if any(_names(name, node) for node in products)}


def product_names(model: ModelProto) -> frozenset[str]:
    """Names of the graph's convolutions and matrix products."""
    return frozenset(node.name for node in _products(model))


def high_precision_products(model: ModelProto, full: ModelProto, precision: Precision) -> frozenset[str]:
    """The products that a derived graph keeps in a higher precision, read from the graph itself.

    Args:
        model: graph of the precision.
        full: FP32 graph that it was made from.
        precision: what `model` is in.
    """
    from cclip_deploy.graph.precision.onnx_graph import tensor_types
    from cclip_deploy.graph.precision.quantize import plan_quantization

    if Precision(precision).is_quantized:
        given_by = {name: node.op_type for node in model.graph.node for name in node.output}
        weights = {p.node: p.weight_input for p in plan_quantization(full).products}
        return frozenset(
            node.name
            for node in model.graph.node
            if node.name in weights and given_by.get(node.input[weights[node.name]]) != "DequantizeLinear"
        )
    types, names = tensor_types(model, {}), product_names(full)
    return frozenset(n.name for n in model.graph.node if n.name in names and types.get(n.output[0]) == _FLOAT)


def _products(model: ModelProto) -> list[NodeProto]:
    from cclip_deploy.graph.precision.quantize import PRODUCTS

    return [node for node in model.graph.node if node.op_type in PRODUCTS]


def _names(name: str, node: NodeProto) -> bool:
    return name == node.name or any(source.startswith(f"{name}.") for source in node.input)


def _quantized(
    model: ModelProto, precision: Precision, ranges: Mapping[str, float], keep: Collection[str]
) -> ConvertedGraph:
    from cclip_deploy.graph.precision.float16 import to_fp16
    from cclip_deploy.graph.precision.quantize import plan_quantization, quantize

    plan = plan_quantization(model, named_products(model, keep))
    if not plan.products:
        raise UsageError(
            f"Nothing of this graph can be quantized, so it has no {precision} form. Leave it in "
            f"{Precision(precision).rest}."
        )
    kind = Precision(precision).product_type
    quantized = quantize(model, plan, ranges, kind)  # type: ignore[arg-type]  # int8 or fp8
    return ConvertedGraph(
        to_fp16(quantized) if Precision(precision).rest == "fp16" else quantized, frozenset(plan.kept)
    )
