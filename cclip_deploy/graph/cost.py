"""Count the multiply-adds of an ONNX graph from its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from cclip_deploy.errors import DataError, UsageError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

SHAPE_CONSTANT_ELEMENTS = 1024
TOP_NODES = 20


@dataclass(frozen=True)
class NodeCost:
    """Multiply-adds of one node."""

    name: str
    op: str
    output_shape: Shape
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a graph: the total, the sum by operator, and the TOP_NODES most expensive nodes first."""

    total: int
    by_op: dict[str, int]
    by_node: tuple[NodeCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form."""
        return {"total": self.total, "by_op": self.by_op, "by_node": [asdict(node) for node in self.by_node]}


def count_multiply_adds(model: onnx.ModelProto, sizes: Mapping[str, int]) -> Cost:
    """Count the multiply-adds of every matrix product and convolution in the graph, float or quantized.

    A product of (M, K) and (K, N) counts M·K·N. A convolution counts its output elements times the kernel elements of a
    group; a transposed convolution counts its input elements times them. Products with padding count; adding a bias
    does not. Elementwise operators, reductions, gathers, resizes, pools and normalizations count 0.

    Args:
        model: any opset; its weights are neither copied nor read.
        sizes: a value for each symbolic dimension of the inputs, for example {"batch": 1, "prompts": 1}. Names that the
            graph does not have are ignored, so that one mapping serves all graphs of a bundle.

    Raises:
        UsageError: a symbolic dimension has no value, or a value below 1.
        DataError: shapes or types contradict each other, the shape of a counted node cannot be inferred, or an operator
            has no counting rule. The message names the node.
    """
    counted = cost_of_nodes(model, sizes)
    by_op: Counter[str] = Counter()
    for cost in counted:
        by_op[cost.op] += cost.multiply_adds
    most_expensive = sorted(counted, key=lambda cost: cost.multiply_adds, reverse=True)
    return Cost(sum(by_op.values()), dict(by_op.most_common()), tuple(most_expensive[:TOP_NODES]))


def cost_of_nodes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> list[NodeCost]:
    """Return the cost of every counted node in graph order; arguments and errors are those of `count_multiply_adds`."""
    skeleton = _inline_functions(_without_weights(model, sizes))
    shapes = _infer_shapes(skeleton)
    return [cost for node in skeleton.graph.node if (cost := _cost_of(_Node(node, shapes))) is not None]


def multiply_add_fraction(model: onnx.ModelProto, nodes: Collection[str], sizes: Mapping[str, int]) -> float:
    """Return the fraction, 0 to 1, of a graph's multiply-adds that the named nodes perform."""
    counted = cost_of_nodes(model, sizes)
    named = sum(cost.multiply_adds for cost in counted if cost.name in nodes)
    return named / max(1, sum(cost.multiply_adds for cost in counted))


@dataclass(frozen=True)
class _Node:
    """A node with the shapes of the graph's tensors."""

    proto: onnx.NodeProto
    shapes: Mapping[str, Shape]

    def __str__(self) -> str:
        return f"node {self.proto.name or self.proto.output[0]!r} ({self.proto.op_type})"

    def input(self, index: int) -> Shape:
        return self._shape(self.proto.input[index])

    def output(self) -> Shape:
        return self._shape(self.proto.output[0])

    def attribute(self, name: str, default: Any) -> Any:
        import onnx

        found = [onnx.helper.get_attribute_value(item) for item in self.proto.attribute if item.name == name]
        return found[0] if found else default

    def _shape(self, tensor: str) -> Shape:
        if tensor not in self.shapes:
            raise DataError(
                f"Cannot count the multiply-adds of {self}: the shape of {tensor!r} cannot be "
                "inferred from the graph's inputs. Fold the graph's constants, or export it with fixed sizes."
            )
        return self.shapes[tensor]


def _product(node: _Node) -> int:
    return prod(node.output()) * node.input(0)[-1]


def _gemm(node: _Node) -> int:
    return prod(node.output()) * node.input(0)[0 if node.attribute("transA", 0) else 1]


def _convolution(node: _Node) -> int:
    return prod(node.output()) * prod(node.input(_weight_index(node))[1:])  # weight (C_out, C_in / groups, *kernel)


def _transposed_convolution(node: _Node) -> int:
    return prod(node.input(0)) * prod(node.input(1)[1:])  # weight (C_in, C_out / groups, *kernel)


def _weight_index(node: _Node) -> int:
    return 3 if node.proto.op_type.startswith("QLinear") else 1


def _einsum(node: _Node) -> int:
    equation = node.attribute("equation", b"").decode().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if len(terms) > 2 or "." in equation:
        raise DataError(f"Cannot count {node}: no rule for the equation {equation!r}. Write it as MatMul nodes.")
    extent: dict[str, int] = {}
    for index, term in enumerate(terms):
        for label, size in zip(term, node.input(index), strict=True):
            extent[label] = max(size, extent.get(label, 1))
    return prod(extent.values()) if len(terms) == 2 else 0


RULES: dict[str, Callable[[_Node], int]] = {
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _gemm,
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Einsum": _einsum,
}
WITHOUT_RULE = frozenset({"Attention", "LSTM", "GRU", "RNN", "DeformConv", "DFT", "STFT"})
STANDARD_DOMAINS = ("", "ai.onnx")


def _cost_of(node: _Node) -> NodeCost | None:
    proto = node.proto
    hidden = sorted(set(_operators_inside(proto)) & (RULES.keys() | WITHOUT_RULE))
    if proto.op_type in WITHOUT_RULE or proto.domain not in STANDARD_DOMAINS or hidden:
        reason = (
            f"it has {', '.join(hidden)} in a subgraph" if hidden else f"no rule for {proto.domain or 'this'} operator"
        )
        raise DataError(f"Cannot count {node}: {reason}. Export the graph without it, or add a rule to graph/cost.py.")
    if proto.op_type not in RULES:
        return None
    return NodeCost(proto.name or proto.output[0], proto.op_type, node.output(), RULES[proto.op_type](node))


def _operators_inside(proto: onnx.NodeProto) -> list[str]:
    subgraphs = [graph for item in proto.attribute for graph in (item.g, *item.graphs)]
    inner = [node for graph in subgraphs for node in graph.node]
    return [name for node in inner for name in (node.op_type, *_operators_inside(node))]


def _without_weights(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Copy a graph with its input sizes bound and its large weights replaced by inputs of the same shape."""
    import onnx

    graph = onnx.GraphProto(name=model.graph.name)
    stored = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(_bind(value, sizes) for value in model.graph.input if value.name not in stored)
    graph.output.extend(
        onnx.ValueInfoProto(name=value.name, type=_without_shape(value.type)) for value in model.graph.output
    )
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SHAPE_CONSTANT_ELEMENTS:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    graph.node.extend(model.graph.node)
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph
    )


def _bind(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> onnx.ValueInfoProto:
    import onnx

    bound = onnx.ValueInfoProto()
    bound.CopyFrom(value)
    for axis, dim in enumerate(bound.type.tensor_type.shape.dim):
        if dim.HasField("dim_value"):
            continue
        symbol = dim.dim_param
        if not symbol:
            raise DataError(
                f"Axis {axis} of input {value.name!r} has neither a size nor a name. Export it with a named dimension."
            )
        if sizes.get(symbol, 0) < 1:
            raise UsageError(
                f"Input {value.name!r} has the symbolic size {symbol!r} on axis {axis}; the given sizes are "
                f"{dict(sizes)}. Give {symbol!r} a value of 1 or more."
            )
        dim.dim_value = sizes[symbol]
    return bound


def _without_shape(kind: onnx.TypeProto) -> onnx.TypeProto:
    import onnx

    return onnx.helper.make_tensor_type_proto(kind.tensor_type.elem_type, None)


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.inliner import inline_local_functions

    return inline_local_functions(model) if model.functions else model


def _infer_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    from onnx import shape_inference

    try:
        graph = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except shape_inference.InferenceError as error:
        raise DataError(f"Shape inference failed for these sizes: {error}") from error
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            known[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return known
