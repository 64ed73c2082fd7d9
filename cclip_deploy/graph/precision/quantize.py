"""Quantize an FP32 graph to INT8 or FP8 with explicit QuantizeLinear and DequantizeLinear pairs (Q/DQ).

What is quantized is decided by structure: convolutions and matrix products of one activation with one learned constant.
Not quantized: products of two activations (attention, CARAFE, the prompt's kernel), products with an interpolation
matrix (a constant with all entries in [0, 1]), and everything that depends on the prompt's tokens.

All codes are signed and symmetric with zero point 0. Activations have one scale per tensor, weights one per channel;
weights are stored as INT8 or FP8 with a DequantizeLinear alone, and biases stay float. The skip branch of every
residual sum gets a pair, so that the sum can be fused into the preceding convolution. The inputs of a concatenation are
quantized with one scale and their codes are joined: the values are the same, and OpenVINO computes this form correctly
(INT8 only, because ONNX cannot concatenate FP8).

onnxruntime's quantizer is not used: it adds no pair on skips, and quantizes biases by default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.onnx_graph import (
    check_convertible,
    float_constants,
    is_float_constant,
    raise_opset,
    varying_tensors,
)
from cclip_deploy.graph.precision.residuals import find_residual_skips

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto

    Array = np.ndarray[Any, Any]

Quantized = Literal["int8", "fp8"]
LARGEST_CODE: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest absolute value of a code; -128 is not used, so that the codes are symmetric."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Operators that are convolutions or matrix products."""

_PASSING = frozenset({"AveragePool", "MaxPool"})
_INT8, _FLOAT8E4M3FN = 3, 17  # TensorProto.INT8, TensorProto.FLOAT8E4M3FN
_OPSET = 19  # the first with FP8 and with scales in the type of the rest of the graph
_SMALLEST_NORMAL_HALF, _HALF_STEP = 2.0**-14, 2.0**-24


@dataclass(frozen=True)
class QuantizedProduct:
    """A product to quantize: the indices of its data and weight inputs, and the channel axis of the weights."""

    node: str
    data_input: int
    weight_input: int
    channel_axis: int


@dataclass(frozen=True)
class QuantizationPlan:
    """What of a graph is quantized.

    Attributes:
        products: in graph order.
        skips: node name and input index of the skip branch of every residual sum.
        high_precision: names of the products that are not quantized.
        tensors: activations that need a range, in graph order.
    """

    products: tuple[QuantizedProduct, ...]
    skips: tuple[tuple[str, int], ...]
    high_precision: tuple[str, ...]
    tensors: tuple[str, ...]


def plan_quantization(model: ModelProto, high_precision: Collection[str] = ()) -> QuantizationPlan:
    """Decide what is quantized, by the rules in the module's docstring.

    Args:
        model: FP32 graph without subgraphs; every product has a name.
        high_precision: names of further products that are not quantized, for example from a sensitivity search.

    Raises:
        UsageError: a name in `high_precision` is not a convolution or matrix product of the graph.
    """
    check_convertible(model)
    products, unquantized = _sort_products(model, frozenset(high_precision))
    by_name = {node.name: node for node in model.graph.node}
    unknown = sorted(set(high_precision) - set(unquantized))
    if unknown:
        raise UsageError(
            f"The graph has no convolution or matrix product named {', '.join(map(repr, unknown))}, so it "
            "cannot stay in a higher precision."
        )
    skips = _skips(model, {product.node for product in products})
    read = {by_name[product.node].input[product.data_input] for product in products}
    read |= {by_name[name].input[index] for name, index in skips}
    order = [*(value.name for value in model.graph.input), *(o for node in model.graph.node for o in node.output)]
    return QuantizationPlan(products, skips, unquantized, tuple(name for name in order if name in read))


def _skips(model: ModelProto, quantized: set[str]) -> tuple[tuple[str, int], ...]:
    """Return the skips of sums whose main branch is a quantized product.

    Skips are found as if no product were excluded, so that one calibration serves every choice of high-precision nodes.
    """
    possible, _ = _sort_products(model, frozenset())
    found = find_residual_skips(model, {product.node for product in possible})
    return tuple((node, index) for node, index, product in found if product in quantized)


def quantize(model: ModelProto, plan: QuantizationPlan, ranges: Mapping[str, float], kind: Quantized) -> ModelProto:
    """Return the graph with Q/DQ pairs, in opset 19 or newer, with the inputs and outputs of `model`.

    Scales are representable in float16, so that `to_fp16` can convert the rest of the graph afterwards.

    Args:
        model: the FP32 graph of the plan.
        plan: from `plan_quantization`.
        ranges: largest absolute value to represent, for each of `plan.tensors`.
        kind: type of the codes.

    Raises:
        UsageError: a tensor has no range.
        ParityError: a range or a weight is not finite.
    """
    import onnx

    missing = [name for name in plan.tensors if name not in ranges]
    if missing:
        raise UsageError(f"{len(missing)} tensors have no range, the first is {missing[0]!r}. Calibrate this graph.")
    quantized = _Quantization(raise_opset(model, _OPSET), plan, ranges, kind).convert()
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def scale_of(largest: float, kind: Quantized) -> float:
    """Return the smallest float16-representable scale at which the largest code represents at least `largest`."""
    import numpy as np

    if largest <= 0:
        return _SMALLEST_NORMAL_HALF
    exact = largest / LARGEST_CODE[kind]
    half = float(np.float16(exact))
    if half < exact:
        half = float(np.nextafter(np.float16(half), np.float16(np.inf)))
    return max(half, _HALF_STEP)


def weight_codes(values: Array, axis: int, kind: Quantized) -> tuple[Array, Array]:
    """Return the codes of weights (int8 or float8_e4m3fn) and one float32 scale for each channel of `axis`."""
    import ml_dtypes
    import numpy as np

    others = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values).max(axis=others)
    scales = np.array([scale_of(float(value), kind) for value in largest], np.float32)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    scaled = values / scales.reshape(shape)
    limit = LARGEST_CODE[kind]
    if kind == "int8":
        return np.clip(np.rint(scaled), -limit, limit).astype(np.int8), scales
    return np.clip(scaled, -limit, limit).astype(ml_dtypes.float8_e4m3fn), scales


def _sort_products(model: ModelProto, high: frozenset[str]) -> tuple[tuple[QuantizedProduct, ...], tuple[str, ...]]:
    """Return the products to quantize, and the names of those to leave in high precision."""
    constants = dict(float_constants(model.graph))
    varying, of_prompt = varying_tensors(model), varying_tensors(model, integers_only=True)
    quantized, unquantized = [], []
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or varying.isdisjoint(node.input):
            continue
        if not node.name:
            raise ParityError(f"The {node.op_type} of output {node.output[0]!r} has no name. Export the graph again.")
        product = None if node.name in high or not of_prompt.isdisjoint(node.input) else _as_product(node, constants)
        if product is None:
            unquantized.append(node.name)
        else:
            quantized.append(product)
    return tuple(quantized), tuple(unquantized)


def _as_product(node: NodeProto, constants: Mapping[str, TensorProto]) -> QuantizedProduct | None:
    """Return how a node is quantized, or None if it has no learned weights or TensorRT does not support its form."""
    stored = [index for index, name in enumerate(node.input[:2]) if name in constants]
    if len(stored) != 1 or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight = constants[node.input[stored[0]]]
    if node.op_type == "Conv":
        return None if stored == [0] else QuantizedProduct(node.name, 0, 1, 0)
    if len(weight.dims) != 2 or _interpolates(weight):
        return None
    flags = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
    if stored == [1]:
        return QuantizedProduct(node.name, 0, 1, 0 if flags.get("transB") else 1)
    return QuantizedProduct(node.name, 1, 0, 1 if flags.get("transA") else 0)


def _interpolates(weight: TensorProto) -> bool:
    """Return whether a constant matrix is an interpolation rather than learned: all entries lie in [0, 1]."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(weight)
    return bool(values.min() >= 0 and values.max() <= 1)


class _Quantization:
    """Converts the nodes in order: a tensor's pair follows its producer, a weight's precedes its first reader."""

    def __init__(self, model: ModelProto, plan: QuantizationPlan, ranges: Mapping[str, float], kind: Quantized) -> None:
        self.model, self.plan, self.ranges, self.kind = model, plan, ranges, kind
        self.constants = dict(float_constants(model.graph))
        self.nodes: list[NodeProto] = []
        self.weights: dict[tuple[str, int], str] = {}
        self.stored: list[TensorProto] = []

    def convert(self) -> ModelProto:
        import onnx

        products = {product.node: product for product in self.plan.products}
        skips = dict(self.plan.skips)
        self._add_zero_point()
        for value in self.model.graph.input:
            self._pair(value.name)
        for node in self.model.graph.node:
            if is_float_constant(node, self.constants):
                self._copy_constant(node)
                continue
            new = onnx.NodeProto()
            new.CopyFrom(node)
            self._rewire(new, products.get(node.name), skips.get(node.name))
            self.nodes.append(new)
            for name in node.output:
                self._pair(name, node.input if node.op_type == "Concat" and self.kind == "int8" else ())
        return self._assemble()

    def _rewire(self, node: NodeProto, product: QuantizedProduct | None, skip: int | None) -> None:
        if product is not None:
            data, weight = product.data_input, product.weight_input
            node.input[weight] = self._quantized_weight(node.input[weight], product.channel_axis)
            node.input[data] = _dequantized(node.input[data])
        elif skip is not None:
            node.input[skip] = _dequantized(node.input[skip])
        elif node.op_type in _PASSING and node.input[0] in self.plan.tensors:
            node.input[0] = _dequantized(node.input[0])

    def _pair(self, name: str, branches: Sequence[str] = ()) -> None:
        """Add Q/DQ of a tensor; for a concatenation of `branches`, quantize each branch and join the codes."""
        import onnx
        from onnx import helper

        if name not in self.plan.tensors:
            return
        largest = self.ranges[name]
        if not 0 <= largest < float("inf"):
            raise ParityError(
                f"The range of tensor {name!r} is {largest}. Calibrate with images that give finite values."
            )
        scale, zero, codes = f"{name}/scale", f"{self.kind}/zero_point", f"{name}/{self.kind}"
        self._store(scale, _float32(scale_of(largest, self.kind)))
        parts = [f"{codes}/{number}" for number in range(len(branches))] or [codes]
        for source, target in zip(branches or [name], parts, strict=True):
            self.nodes.append(
                helper.make_node("QuantizeLinear", [source, scale, zero], [target], name=f"quantize {target}")
            )
        if branches:
            joined = onnx.NodeProto()
            joined.CopyFrom(self.nodes[-1 - len(branches)])
            joined.name, joined.input[:], joined.output[:] = f"{joined.name}/{self.kind}", parts, [codes]
            self.nodes.append(joined)
        self.nodes.append(
            helper.make_node("DequantizeLinear", [codes, scale, zero], [_dequantized(name)], name=f"dequantize {name}")
        )

    def _quantized_weight(self, name: str, axis: int) -> str:
        """Return the name of a weight's dequantized form, which is created at its first use."""
        import numpy as np
        from onnx import helper, numpy_helper

        if (name, axis) not in self.weights:
            values = numpy_helper.to_array(self.constants[name])
            if not np.isfinite(values).all():
                raise ParityError(f"Weight {name!r} has values that are not finite. Train or export it again.")
            codes, scales = weight_codes(values, axis, self.kind)
            stem = f"{name}/{self.kind}" + (f"/axis{axis}" if any(known == name for known, _ in self.weights) else "")
            self._store(stem, codes)
            self._store(f"{stem}/scale", scales)
            node = helper.make_node(
                "DequantizeLinear",
                [stem, f"{stem}/scale"],
                [f"{stem}/dequantized"],
                name=f"dequantize {stem}",
                axis=axis,
            )
            self.nodes.append(node)
            self.weights[name, axis] = f"{stem}/dequantized"
        return self.weights[name, axis]

    def _add_zero_point(self) -> None:
        import ml_dtypes
        import numpy as np

        zero = np.zeros((), np.int8 if self.kind == "int8" else ml_dtypes.float8_e4m3fn)
        self._store(f"{self.kind}/zero_point", zero)

    def _copy_constant(self, node: NodeProto) -> None:
        from onnx import NodeProto

        new = NodeProto()
        new.CopyFrom(node)
        self.nodes.append(new)

    def _store(self, name: str, values: Array) -> None:
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(values, name))

    def _assemble(self) -> ModelProto:
        import onnx

        source = self.model.graph
        quantized = onnx.ModelProto()
        quantized.ir_version = max(self.model.ir_version, 9)  # the first with FP8
        quantized.opset_import.extend(self.model.opset_import)
        quantized.metadata_props.extend(self.model.metadata_props)
        graph = quantized.graph
        graph.name = source.name
        graph.input.extend(source.input)
        graph.output.extend(source.output)
        read = {name for node in self.nodes for name in node.input} | {value.name for value in source.output}
        graph.node.extend(node for node in self.nodes if node.op_type != "Concat" or node.output[0] in read)
        read = {name for node in graph.node for name in node.input} | {value.name for value in source.output}
        graph.value_info.extend(value for value in source.value_info if value.name in read)
        graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in read)
        graph.initializer.extend(tensor for tensor in self.stored if tensor.name in read)
        return quantized


def _dequantized(name: str) -> str:
    return f"{name}/dequantized"


def _float32(value: float) -> Array:
    import numpy as np

    return np.array(value, np.float32)
