"""Convert an FP32 graph to FP16 or BF16.

Types are written into the ONNX file, and engines are built strongly typed. Every node runs in one type. A node's float
inputs are cast where they have the other type, and each cast is made once and shared. Weights are converted, not cast;
a weight that nodes of both types read is stored in both. The operators' ONNX schemas say which inputs may have 16 bits,
so a resize keeps its FP32 scales.

The converters of onnxruntime and onnxconverter_common are not used: they round a resize's scales (600 rows became 799
instead of 800), leave `value_float` constants FP32 in an FP16 sum, and append casts out of order, which onnx.checker
rejects.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.graph.precision.onnx_graph import (
    check_convertible,
    float_constants,
    is_float_constant,
    raise_opset,
    tensor_types,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FP32_OPS = frozenset(
    {
        "CumSum",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "ReduceL2",
        "ReduceSumSquare",
        "Softmax",
    }
)
"""Operators that stay FP32: their sums of squares and exponentials exceed float16's range or precision."""

LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-24
LARGEST_BFLOAT = 3.3895313892515355e38
MASKED = -30000.0
"""Replaces minus infinity in an additive mask: exp() of it is 0, and the sum of two is finite in float16."""

_FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True)
class _Float16Type:
    """A 16-bit float type and its limits; `opset` is the first that supports it."""

    name: str
    kind: int
    numpy_name: str
    schema_type: str
    largest: float
    rounds_to_largest: float
    smallest: float
    opset: int


_HALF = _Float16Type("fp16", 10, "float16", "tensor(float16)", LARGEST_HALF, LARGEST_HALF + 16, SMALLEST_HALF, 1)
# Convolution and pooling accept bfloat16 from opset 22 on.
_BFLOAT = _Float16Type("bf16", 16, "bfloat16", "tensor(bfloat16)", LARGEST_BFLOAT, LARGEST_BFLOAT, 2.0**-133, 22)
_TYPED_BY_ATTRIBUTE = frozenset(
    {
        "Bernoulli",
        "ConstantOfShape",
        "EyeLike",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


def to_fp16(model: ModelProto, fp32_ops: Collection[str] = FP32_OPS, fp32_nodes: Collection[str] = ()) -> ModelProto:
    """Convert a graph to compute in float16; `model` is not changed.

    Graph inputs and outputs keep name and type (images and logits float32, tokens int64). Float weights become float16,
    nonzero ones at least 2**-24 in magnitude. A mask constant (only zeros and values at or below -65504, minus infinity
    included, read by Add or Where alone) has those values set to -30000.

    Args:
        model: FP32 graph without subgraphs, weights loaded.
        fp32_ops: operator types that stay FP32.
        fp32_nodes: names of further nodes that stay FP32.

    Raises:
        ParityError: float16 cannot represent a weight (the message names it and its reader), or the graph cannot be
            converted faithfully.
        UsageError: a name in `fp32_nodes` that the graph does not have.
    """
    return _convert(model, _HALF, fp32_ops, fp32_nodes)


def to_bf16(model: ModelProto, fp32_ops: Collection[str] = FP32_OPS, fp32_nodes: Collection[str] = ()) -> ModelProto:
    """Convert a graph to compute in bfloat16, in opset 22 or newer; see `to_fp16` for arguments, masks and errors.

    bfloat16 has the range of float32, so only weights that are not finite are rejected.
    """
    return _convert(model, _BFLOAT, fp32_ops, fp32_nodes)


def _convert(
    model: ModelProto, target: _Float16Type, fp32_ops: Collection[str], fp32_nodes: Collection[str]
) -> ModelProto:
    import onnx

    check_convertible(model)
    unknown = sorted(set(fp32_nodes) - {node.name for node in model.graph.node})
    if unknown:
        raise UsageError(f"The graph has no node named {', '.join(map(repr, unknown))}; it cannot stay FP32.")
    if target.opset > 1:
        model = raise_opset(model, target.opset)
    converted = _Conversion(model, target, frozenset(fp32_ops), frozenset(fp32_nodes)).convert()
    try:
        onnx.checker.check_model(converted, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(
            f"The {target.name.upper()} graph is not valid ONNX: {error}. Please report this graph."
        ) from error
    return converted


class _Conversion:
    """Converts the nodes in order; casts are inserted before their first reader, so the order stays topological."""

    def __init__(
        self, model: ModelProto, target: _Float16Type, fp32_ops: frozenset[str], fp32_nodes: frozenset[str]
    ) -> None:
        self.model = model
        self.target = target
        self.constants = dict(float_constants(model.graph))
        self.nodes = [node for node in model.graph.node if not is_float_constant(node, self.constants)]
        self.types = tensor_types(model, self.constants)
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        weights = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value for value in model.graph.input if value.name not in weights]
        self.held = {value.name: _FLOAT for value in self.inputs if self._is_float(value.name)}
        self.names: dict[tuple[str, int], str] = {(name, _FLOAT): name for name in self.held}
        self.runs_in = [self._run_type(node, fp32_ops, fp32_nodes) for node in self.nodes]
        self.readers = self._constant_readers()
        self.outputs = {value.name for value in model.graph.output}
        self.taken = set(self.types)

    def convert(self) -> ModelProto:
        import onnx

        converted = onnx.ModelProto()
        for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            setattr(converted, field, getattr(self.model, field))
        converted.opset_import.extend(self.model.opset_import)
        converted.metadata_props.extend(self.model.metadata_props)
        converted.graph.name = self.model.graph.name
        converted.graph.input.extend(self.inputs)
        converted.graph.output.extend(self.model.graph.output)
        converted.graph.initializer.extend(self._constants_in_their_types())
        for index, (node, run) in enumerate(zip(self.nodes, self.runs_in, strict=True)):
            self._add_node(converted.graph, node, run, index)
        self._add_value_info(converted.graph)
        return converted

    def _add_value_info(self, graph: GraphProto) -> None:
        """Copy the known shapes from the FP32 graph, with the new types."""
        for value in self.model.graph.value_info:
            if value.name in self.constants or value.name in self.outputs:
                continue
            graph.value_info.add().CopyFrom(value)
            if self._is_float(value.name):
                graph.value_info[-1].type.tensor_type.elem_type = self.held[value.name]

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) == _FLOAT

    def _run_type(self, node: NodeProto, fp32_ops: frozenset[str], fp32_nodes: frozenset[str]) -> int:
        """Return the 16-bit type, unless the node has to stay FP32 or has no schema that allows 16 bits."""
        if node.op_type in fp32_ops or node.name in fp32_nodes or node.op_type in _TYPED_BY_ATTRIBUTE:
            return _FLOAT
        schema = self._schema(node)
        if schema is None:
            return _FLOAT
        allowed = self.target.schema_type
        without = {c.type_param_str for c in schema.type_constraints if allowed not in c.allowed_type_strs}
        floats = [
            _formal(formals, index).type_str
            for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs))
            for index, name in enumerate(names)
            if self._is_float(name)
        ]
        return _FLOAT if without.intersection(floats) else self.target.kind

    def _schema(self, node: NodeProto) -> Any:
        import onnx

        try:
            return onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return None

    def _input_types(self, node: NodeProto, run: int) -> list[int]:
        """Return the type in which each input is read; a cast reads its input as it is."""
        if node.op_type == "Cast":
            return [self.held.get(node.input[0], _FLOAT)]
        schema = self._schema(node)
        return _types_by_schema(schema.inputs if schema else None, len(node.input), run)

    def _output_types(self, node: NodeProto, run: int) -> list[int]:
        schema = self._schema(node)
        return _types_by_schema(schema.outputs if schema else None, len(node.output), run)

    def _constant_readers(self) -> dict[str, list[tuple[NodeProto, int]]]:
        """Return the nodes that read each float constant, with the type in which they read it."""
        readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node, run in zip(self.nodes, self.runs_in, strict=True):
            for name, kind in zip(node.input, self._input_types(node, run), strict=True):
                if name in self.constants:
                    readers[name].append((node, kind))
        return readers

    def _constants_in_their_types(self) -> Iterator[TensorProto]:
        """Yield every float constant once for each type in which it is read, and all other constants unchanged."""
        from onnx import numpy_helper

        for tensor in self.model.graph.initializer:
            if tensor.name not in self.constants:
                yield tensor
        for name, tensor in self.constants.items():
            kinds = {kind for _, kind in self.readers[name]} | ({_FLOAT} if name in self.outputs else set())
            if _FLOAT in kinds:
                self.names[name, _FLOAT] = tensor.name
                yield tensor
            if self.target.kind in kinds:
                readers = [node for node, kind in self.readers[name] if kind == self.target.kind]
                converted = _convert_weight(name, numpy_helper.to_array(tensor), readers, self.target)
                stored_as = self._fresh(f"{name}/{self.target.name}") if _FLOAT in kinds else name
                self.names[name, self.target.kind] = stored_as
                yield numpy_helper.from_array(converted, stored_as)

    def _add_node(self, graph: GraphProto, node: NodeProto, run: int, index: int) -> None:
        reads = self._input_types(node, run)
        inputs = [self._read(graph, name, kind) for name, kind in zip(node.input, reads, strict=True)]
        kinds = self._output_types(node, run)
        outputs = [self._write_name(name, kind) for name, kind in zip(node.output, kinds, strict=True)]
        new = graph.node.add()
        new.CopyFrom(node)
        new.name = node.name or self._fresh(f"{node.op_type}_{index}")
        new.input[:] = inputs
        new.output[:] = outputs
        if node.op_type == "Cast" and self._is_float(node.output[0]):
            next(attribute for attribute in new.attribute if attribute.name == "to").i = run
        for name in node.output:
            if name in self.outputs and self.held.get(name) == self.target.kind:
                self._cast(graph, name, _FLOAT, name)

    def _read(self, graph: GraphProto, name: str, kind: int) -> str:
        """Return the name of a float tensor in type `kind`; a cast is added if it does not exist yet."""
        if not self._is_float(name):
            return name
        if (name, kind) not in self.names:
            self._cast(
                graph, name, kind, self._fresh(f"{name}/{self.target.name if kind == self.target.kind else 'fp32'}")
            )
        return self.names[name, kind]

    def _write_name(self, name: str, kind: int) -> str:
        if not self._is_float(name):
            return name
        self.held[name] = kind
        renamed = name in self.outputs and kind == self.target.kind
        self.names[name, kind] = self._fresh(f"{name}/{self.target.name}") if renamed else name
        return self.names[name, kind]

    def _cast(self, graph: GraphProto, name: str, kind: int, target: str) -> None:
        from onnx import helper

        source = self.names[name, self.held[name]]
        graph.node.append(helper.make_node("Cast", [source], [target], name=f"Cast_{target}", to=kind))
        self.names[name, kind] = target

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _convert_weight(
    name: str, values: np.ndarray[Any, Any], readers: list[NodeProto], target: _Float16Type
) -> np.ndarray[Any, Any]:
    """Convert float32 values to the 16-bit type; `to_fp16` documents masks and errors."""
    import ml_dtypes
    import numpy as np

    kind = np.dtype(ml_dtypes.bfloat16 if target.name == "bf16" else np.float16)
    masked = values <= -LARGEST_HALF
    if masked.any() and not values[~masked].any() and {node.op_type for node in readers} <= {"Add", "Where"}:
        mask: np.ndarray[Any, Any] = np.where(masked, kind.type(MASKED), kind.type(0))
        return mask
    outside = ~(np.abs(values) < target.rounds_to_largest)  # NaN too
    if outside.any():
        worst = values[outside][0]
        raise ParityError(
            f"Weight {name!r} has {int(outside.sum())} of {values.size} values that {target.numpy_name} cannot "
            f"represent (the first is {worst:g}, the limit {target.largest:g}), read by node {readers[0].name!r} "
            f"({readers[0].op_type}). "
            f"Leave that node in FP32 (fp32_nodes=[{readers[0].name!r}]) or scale the weight."
        )
    converted: np.ndarray[Any, Any] = values.astype(kind)
    lost = (converted == 0) & (values != 0)
    if lost.any():
        converted[lost] = np.copysign(target.smallest, values[lost]).astype(kind)
    return converted


def _types_by_schema(formals: Any, count: int, run: int) -> list[int]:
    """Return `run` for each of `count` tensors, but float32 where the schema requires it or there is no schema."""
    if formals is None:
        return [_FLOAT] * count
    fixed = [_formal(formals, index).type_str == "tensor(float)" for index in range(count)]
    return [_FLOAT if is_fixed else run for is_fixed in fixed]


def _formal(formals: Any, index: int) -> Any:
    """Return the formal parameter of an input or output; a variadic operator's last one describes all that follow."""
    return formals[min(index, len(formals) - 1)]
