"""An FP32 graph as an INT8 or FP8 graph of explicit QuantizeLinear and DequantizeLinear pairs, as TensorRT reads it.

What is quantized is found by structure, never by name: convolutions and matrix products of one activation with one
learned constant. Left as they are: products of two activations (attention, CARAFE, the prompt's kernel), products with
an interpolation matrix (a constant whose entries all lie in [0, 1]), and whatever depends on the prompt's tokens.
Everything is signed and symmetric with zero point 0: activations have one scale a tensor, weights one a channel and lie
in the file as INT8 or FP8 behind a DequantizeLinear alone; biases stay float. The skip branch of every residual sum
gets a pair, so that the sum can be fused into the convolution before it. What a concatenation gives is quantized before
it, branch by branch at one scale, and its codes are joined: the same numbers, and the form that OpenVINO gets right
(INT8 only: ONNX joins no FP8 codes).

onnxruntime's quantizer was tried first: it has no pair for skips, and quantizes biases unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.onnx_graph import (
    float_constants,
    is_lifted,
    raise_opset,
    refuse_what_has_no_flat_form,
    varying_tensors,
)
from cclip_deploy.graph.precision.residuals import find_residual_skips

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto

    Array = np.ndarray[Any, Any]

Quantized = Literal["int8", "fp8"]
LARGEST_CODE: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest absolute value that a code stands for at scale 1; -128 is not used, so that the codes are symmetric."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Operators that are convolutions or matrix products."""

_PASSING = frozenset({"AveragePool", "MaxPool"})
_INT8, _FLOAT8E4M3FN = 3, 17  # TensorProto.INT8, TensorProto.FLOAT8E4M3FN
_OPSET = 19  # the first with FP8, and with scales of the type that the rest of the graph runs in
_SMALLEST_NORMAL_HALF, _HALF_STEP = 2.0**-14, 2.0**-24


@dataclass(frozen=True)
class QuantizedProduct:
    """A convolution or product to quantize: which inputs hold data and weights, and the weights' channel axis."""

    node: str
    data_input: int
    weight_input: int
    channel_axis: int


@dataclass(frozen=True)
class QuantizationPlan:
    """What of a graph is quantized.

    Attributes:
        products: in the graph's order.
        skips: node name and input index of every residual sum's skip branch.
        kept: names of the products that stay in the rest's precision.
        tensors: activations that need a range, in the graph's order.
    """

    products: tuple[QuantizedProduct, ...]
    skips: tuple[tuple[str, int], ...]
    kept: tuple[str, ...]
    tensors: tuple[str, ...]


def plan_quantization(model: ModelProto, keep: Collection[str] = ()) -> QuantizationPlan:
    """Decide by structure what is quantized; see the module's docstring.

    Args:
        model: FP32 graph without subgraphs; every product has a name.
        keep: names of products that are to stay in the rest's precision, as a sensitivity search finds them.

    Raises:
        UsageError: a name in `keep` that is no convolution or matrix product of the graph.
    """
    refuse_what_has_no_flat_form(model)
    products, kept = _sort_products(model, frozenset(keep))
    by_name = {node.name: node for node in model.graph.node}
    unknown = sorted(set(keep) - set(kept))
    if unknown:
        raise UsageError(
            f"The graph has no convolution or matrix product named {', '.join(map(repr, unknown))}, so none can be "
            "kept in a higher precision."
        )
    skips = _skips(model, {product.node for product in products})
    read = {by_name[product.node].input[product.data_input] for product in products}
    read |= {by_name[name].input[index] for name, index in skips}
    order = [*(value.name for value in model.graph.input), *(o for node in model.graph.node for o in node.output)]
    return QuantizationPlan(products, skips, kept, tuple(name for name in order if name in read))


def _skips(model: ModelProto, quantized: set[str]) -> tuple[tuple[str, int], ...]:
    """The skips of sums whose main branch a quantized product gives.

    Which branch is the skip does not depend on what is kept out, so that one calibration serves every choice of that.
    """
    possible, _ = _sort_products(model, frozenset())
    found = find_residual_skips(model, {product.node for product in possible})
    return tuple((node, index) for node, index, product in found if product in quantized)


def quantize(model: ModelProto, plan: QuantizationPlan, ranges: Mapping[str, float], kind: Quantized) -> ModelProto:
    """A new graph with Q/DQ pairs, of opset 19 or newer, whose inputs and outputs are those of `model`.

    Scales are numbers that float16 can hold, so that `to_fp16` may follow for the rest of the graph.

    Args:
        model: the FP32 graph that the plan was made of.
        plan: from `plan_quantization`.
        ranges: largest absolute value to represent, for each of `plan.tensors`.
        kind: the type of the codes.

    Raises:
        UsageError: a tensor without a range.
        ParityError: a range or a weight that is not finite.
    """
    import onnx

    missing = [name for name in plan.tensors if name not in ranges]
    if missing:
        raise UsageError(f"No range is known for {len(missing)} tensors, first {missing[0]!r}. Calibrate this graph.")
    quantized = _Quantization(raise_opset(model, _OPSET), plan, ranges, kind).convert()
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def scale_of(largest: float, kind: Quantized) -> float:
    """The scale, a number that float16 holds, at which the largest code stands for `largest` or a little more."""
    import numpy as np

    if largest <= 0:
        return _SMALLEST_NORMAL_HALF
    exact = largest / LARGEST_CODE[kind]
    half = float(np.float16(exact))
    if half < exact:
        half = float(np.nextafter(np.float16(half), np.float16(np.inf)))
    return max(half, _HALF_STEP)


def weight_codes(values: Array, axis: int, kind: Quantized) -> tuple[Array, Array]:
    """Codes of the weights (int8, or float8_e4m3fn) and one float32 scale for each channel of `axis`."""
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


def _sort_products(model: ModelProto, keep: frozenset[str]) -> tuple[tuple[QuantizedProduct, ...], tuple[str, ...]]:
    """The products to quantize, and the names of those that stay."""
    constants = dict(float_constants(model.graph))
    varying, of_prompt = varying_tensors(model), varying_tensors(model, integers_only=True)
    quantized, kept = [], []
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or varying.isdisjoint(node.input):
            continue
        if not node.name:
            raise ParityError(f"A {node.op_type} that gives {node.output[0]!r} has no name. Export the graph again.")
        product = None if node.name in keep or not of_prompt.isdisjoint(node.input) else _as_product(node, constants)
        if product is None:
            kept.append(node.name)
        else:
            quantized.append(product)
    return tuple(quantized), tuple(kept)


def _as_product(node: NodeProto, constants: Mapping[str, TensorProto]) -> QuantizedProduct | None:
    """How a node can be quantized; None where it has no learned weights, or no form that TensorRT takes."""
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
    """Whether a constant matrix is a fixed average rather than learned: no entry below 0 or above 1."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(weight)
    return bool(values.min() >= 0 and values.max() <= 1)


class _Quantization:
    """One walk over the nodes: a tensor's pair stands right after what gives it, a weight's before its first reader."""

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
            if is_lifted(node, self.constants):
                self._keep_constant(node)
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
        """A tensor's codes and their values; of a concatenation, whose branches are given, each branch's codes."""
        import onnx
        from onnx import helper

        if name not in self.plan.tensors:
            return
        largest = self.ranges[name]
        if not 0 <= largest < float("inf"):
            raise ParityError(
                f"The range of tensor {name!r} is {largest}. Calibrate on pictures that give finite values."
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
        """The name of a weight's dequantized form, made at its first use."""
        import numpy as np
        from onnx import helper, numpy_helper

        if (name, axis) not in self.weights:
            values = numpy_helper.to_array(self.constants[name])
            if not np.isfinite(values).all():
                raise ParityError(f"Weight {name!r} holds values that are not finite. Train or export it again.")
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

    def _keep_constant(self, node: NodeProto) -> None:
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
        quantized.ir_version = max(self.model.ir_version, 9)  # the first that knows FP8
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
