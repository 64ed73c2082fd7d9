"""An FP32 graph as an FP16 graph: precision is written into the ONNX file, and engines are built strongly typed.

Every node runs in one type. A node's float inputs are cast where they are held in the other type, and each cast is made
once and shared; weights are converted, not cast, and a weight that both types read is stored in both. Which inputs may
be half at all is read from the operators' ONNX schemas, so a resize keeps its FP32 scales.

onnxruntime's and onnxconverter_common's converters were tried first: they round a resize's scales (600 rows became 799
instead of 800), leave `value_float` constants FP32 in a half sum, and append casts out of order, which onnx.checker
refuses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from cclip_deploy.errors import ParityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FP32_ISLANDS = frozenset(
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
"""Operators that stay FP32: sums of squares and of exponentials leave float16's range or its eleven bits."""

LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-24
MASKED = -30000.0
"""Stands for minus infinity in an additive mask: exp() of it is 0 beside any unmasked score; two stay finite."""

_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT, TensorProto.FLOAT16
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
_SHORT_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def to_fp16(model: ModelProto, islands: Collection[str] = FP32_ISLANDS, fp32_nodes: Collection[str] = ()) -> ModelProto:
    """A new graph that computes in float16; `model` is not changed.

    Graph inputs and outputs keep name and type (images and logits float32, tokens int64). Float weights become float16,
    nonzero ones at least 2**-24. A mask constant (only zeros and values at or below -65504, minus infinity included,
    read by Add or Where alone) has those values set to -30000.

    Args:
        model: FP32 graph without subgraphs, weights loaded.
        islands: operator types that stay FP32.
        fp32_nodes: names of further nodes that stay FP32.

    Raises:
        ParityError: a weight that float16 cannot hold (its name and reader are given), or a graph that this pass cannot
            convert faithfully.
        UsageError: a name in `fp32_nodes` that the graph does not have.
    """
    import onnx

    _refuse_what_has_no_flat_form(model)
    unknown = sorted(set(fp32_nodes) - {node.name for node in model.graph.node})
    if unknown:
        raise UsageError(f"The graph has no node named {', '.join(map(repr, unknown))}; it cannot be kept in FP32.")
    half = _Conversion(model, frozenset(islands), frozenset(fp32_nodes)).convert()
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"The FP16 graph is not valid ONNX: {error}. Please report this graph.") from error
    return half


def precision_share(model: ModelProto) -> dict[str, int]:
    """Elements of the stored weights by type, for example {"fp16": 94500000, "fp32": 4096, "int64": 12}."""
    from onnx import TensorProto

    share: dict[str, int] = defaultdict(int)
    for tensor in model.graph.initializer:
        name = TensorProto.DataType.Name(tensor.data_type)
        share[_SHORT_NAMES.get(name, name.lower())] += math.prod(tensor.dims)
    return dict(share)


class _Conversion:
    """One walk over the nodes, in their order; casts are placed before their first reader, so the order stays valid."""

    def __init__(self, model: ModelProto, islands: frozenset[str], fp32_nodes: frozenset[str]) -> None:
        self.model = model
        self.constants = dict(_float_constants(model.graph))
        self.nodes = [node for node in model.graph.node if not _is_lifted(node, self.constants)]
        self.types = _tensor_types(model, self.constants)
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        weights = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value for value in model.graph.input if value.name not in weights]
        self.held = {value.name: _FLOAT for value in self.inputs if self._is_float(value.name)}
        self.names: dict[tuple[str, int], str] = {(name, _FLOAT): name for name in self.held}
        self.runs_in = [self._run_type(node, islands, fp32_nodes) for node in self.nodes]
        self.readers = self._constant_readers()
        self.outputs = {value.name for value in model.graph.output}
        self.taken = set(self.types)

    def convert(self) -> ModelProto:
        import onnx

        half = onnx.ModelProto()
        for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            setattr(half, field, getattr(self.model, field))
        half.opset_import.extend(self.model.opset_import)
        half.metadata_props.extend(self.model.metadata_props)
        half.graph.name = self.model.graph.name
        half.graph.input.extend(self.inputs)
        half.graph.output.extend(self.model.graph.output)
        half.graph.initializer.extend(self._constants_in_their_types())
        for index, (node, run) in enumerate(zip(self.nodes, self.runs_in, strict=True)):
            self._add_node(half.graph, node, run, index)
        self._add_value_info(half.graph)
        return half

    def _add_value_info(self, graph: GraphProto) -> None:
        """The shapes that the FP32 graph knew, with the types that the tensors have now."""
        for value in self.model.graph.value_info:
            if value.name in self.constants or value.name in self.outputs:
                continue
            graph.value_info.add().CopyFrom(value)
            if self._is_float(value.name):
                graph.value_info[-1].type.tensor_type.elem_type = self.held[value.name]

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) == _FLOAT

    def _run_type(self, node: NodeProto, islands: frozenset[str], fp32_nodes: frozenset[str]) -> int:
        """FLOAT16 unless the node is an island, or its schema (or the lack of one) forbids half."""
        if node.op_type in islands or node.name in fp32_nodes or node.op_type in _TYPED_BY_ATTRIBUTE:
            return _FLOAT
        schema = self._schema(node)
        if schema is None:
            return _FLOAT
        half_free = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" not in c.allowed_type_strs}
        floats = [
            _formal(formals, index).type_str
            for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs))
            for index, name in enumerate(names)
            if self._is_float(name)
        ]
        return _FLOAT if half_free.intersection(floats) else _HALF

    def _schema(self, node: NodeProto) -> Any:
        import onnx

        try:
            return onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return None

    def _input_types(self, node: NodeProto, run: int) -> list[int]:
        """The type each input is read in; a cast reads what is there."""
        if node.op_type == "Cast":
            return [self.held.get(node.input[0], _FLOAT)]
        schema = self._schema(node)
        return _types_by_schema(schema.inputs if schema else None, len(node.input), run)

    def _output_types(self, node: NodeProto, run: int) -> list[int]:
        schema = self._schema(node)
        return _types_by_schema(schema.outputs if schema else None, len(node.output), run)

    def _constant_readers(self) -> dict[str, list[tuple[NodeProto, int]]]:
        """For each float constant the nodes that read it, with the type they read."""
        readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node, run in zip(self.nodes, self.runs_in, strict=True):
            for name, kind in zip(node.input, self._input_types(node, run), strict=True):
                if name in self.constants:
                    readers[name].append((node, kind))
        return readers

    def _constants_in_their_types(self) -> Iterator[TensorProto]:
        """Every constant, once a type that reads it; a constant of another type than float as it is."""
        from onnx import numpy_helper

        for tensor in self.model.graph.initializer:
            if tensor.name not in self.constants:
                yield tensor
        for name, tensor in self.constants.items():
            kinds = {kind for _, kind in self.readers[name]} | ({_FLOAT} if name in self.outputs else set())
            if _FLOAT in kinds:
                self.names[name, _FLOAT] = tensor.name
                yield tensor
            if _HALF in kinds:
                readers = [node for node, kind in self.readers[name] if kind == _HALF]
                halved = _halve(name, numpy_helper.to_array(tensor), readers)
                self.names[name, _HALF] = self._fresh(f"{name}/fp16") if _FLOAT in kinds else name
                yield numpy_helper.from_array(halved, self.names[name, _HALF])

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
            if name in self.outputs and self.held.get(name) == _HALF:
                self._cast(graph, name, _FLOAT, name)

    def _read(self, graph: GraphProto, name: str, kind: int) -> str:
        """The name under which a float tensor is held in `kind`, cast if it is not there yet."""
        if not self._is_float(name):
            return name
        if (name, kind) not in self.names:
            self._cast(graph, name, kind, self._fresh(f"{name}/{'fp16' if kind == _HALF else 'fp32'}"))
        return self.names[name, kind]

    def _write_name(self, name: str, kind: int) -> str:
        if not self._is_float(name):
            return name
        self.held[name] = kind
        self.names[name, kind] = self._fresh(f"{name}/fp16") if name in self.outputs and kind == _HALF else name
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


def _halve(name: str, values: np.ndarray[Any, Any], readers: list[NodeProto]) -> np.ndarray[Any, Any]:
    """The float32 values as float16; see `to_fp16` for masks and for what is refused."""
    import numpy as np

    masked = values <= -LARGEST_HALF
    if masked.any() and not values[~masked].any() and {node.op_type for node in readers} <= {"Add", "Where"}:
        return np.where(masked, np.float16(MASKED), np.float16(0))
    outside = ~(np.abs(values) < LARGEST_HALF + 16)  # NaN too; what is nearer rounds to 65504
    if outside.any():
        worst = values[outside][0]
        raise ParityError(
            f"Weight {name!r} has {int(outside.sum())} of {values.size} values that float16 cannot hold (the first is "
            f"{worst:g}, the limit 65504), read by node {readers[0].name!r} ({readers[0].op_type}). "
            f"Keep that node in FP32 (fp32_nodes=[{readers[0].name!r}]) or scale the weight."
        )
    halved = values.astype(np.float16)
    lost = (halved == 0) & (values != 0)
    if lost.any():
        halved[lost] = np.copysign(SMALLEST_HALF, values[lost]).astype(np.float16)
    return halved


def _float_constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Name and tensor of every float32 initializer and Constant node."""
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


def _is_lifted(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    return node.op_type == "Constant" and node.output[0] in constants


def _tensor_types(model: ModelProto, constants: dict[str, TensorProto]) -> dict[str, int]:
    """Element type of every tensor, by ONNX's own inference on the graph without its weights."""
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
            raise ParityError(f"The type of tensor {name!r} cannot be inferred, so the graph cannot be made FP16.")
    return types


def _refuse_what_has_no_flat_form(model: ModelProto) -> None:
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ParityError(
                f"Node {node.name!r} ({node.op_type}) has a subgraph, which the FP16 conversion does not follow. "
                "Export the graph without control flow."
            )
    if model.functions or model.graph.sparse_initializer:
        raise ParityError("The graph has local functions or sparse weights. Inline or densify them before FP16.")
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            raise ParityError(f"Weight {tensor.name!r} lies in another file. Load the graph with its external data.")


def _types_by_schema(formals: Any, count: int, run: int) -> list[int]:
    """`run` for each of `count` float tensors, but float32 where the schema fixes that, or where there is none."""
    if formals is None:
        return [_FLOAT] * count
    fixed = [_formal(formals, index).type_str == "tensor(float)" for index in range(count)]
    return [_FLOAT if is_fixed else run for is_fixed in fixed]


def _formal(formals: Any, index: int) -> Any:
    """The formal parameter of an input or output; the last one of a variadic operator serves all that follow."""
    return formals[min(index, len(formals) - 1)]
