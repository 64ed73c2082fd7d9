"""Compare two ONNX graphs node by node: structure, attributes, weights, scales and zero points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

    Array = np.ndarray[Any, Any]

_QUANTIZED_INPUTS = {1: "scale", 2: "zero point"}


def differences(found: ModelProto, expected: ModelProto) -> Iterator[str]:
    """Yield a description of every node of `found` that differs from `expected`; nothing if the graphs are equal.

    Nodes are compared in graph order by operator, name, inputs, outputs, attributes and the bits of the stored tensors
    that they read. The comparison ends at the first node that is missing, unexpected or of another operator. Names of
    graphs, documentation strings and inferred shapes are ignored.
    """
    for kind in ("input", "output"):
        actual, wanted_ends = (_signatures(getattr(model.graph, kind)) for model in (found, expected))
        if actual != wanted_ends:
            yield f"graph {kind}s: {actual} instead of {wanted_ends}"
    if _opsets(found) != _opsets(expected):
        yield f"operator sets: {_opsets(found)} instead of {_opsets(expected)}"
    stored, wanted = ({t.name: t for t in model.graph.initializer} for model in (found, expected))
    seen: set[str] = set()
    for node, other in zip_longest(found.graph.node, expected.graph.node):
        if node is None:
            yield f"node {other.name!r} ({other.op_type}): missing"
            return
        if other is None or (node.op_type, node.domain) != (other.op_type, other.domain):
            instead = f", instead of {other.name!r} ({other.op_type})" if other is not None else ""
            yield f"node {node.name!r} ({node.op_type}): unexpected{instead}"
            return
        for difference in (*_structure(node, other), *_tensors(node, stored, wanted, seen)):
            yield f"node {other.name!r} ({other.op_type}): {difference}"
    unread = (stored.keys() ^ wanted.keys()) - seen
    if unread:
        yield f"stored tensors: {', '.join(sorted(unread)[:3])} in one of the graphs only"


def _structure(node: NodeProto, expected: NodeProto) -> Iterator[str]:
    if node.name != expected.name:
        yield f"name is {node.name!r}"
    for kind in ("input", "output"):
        actual, wanted_names = list(getattr(node, kind)), list(getattr(expected, kind))
        if actual != wanted_names:
            yield f"{kind}s are {actual} instead of {wanted_names}"
    given, wanted = ({a.name: a.SerializeToString(deterministic=True) for a in n.attribute} for n in (node, expected))
    changed = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
    if changed:
        yield f"attribute {', '.join(changed)} differs"


def _tensors(
    node: NodeProto, stored: dict[str, TensorProto], wanted: dict[str, TensorProto], seen: set[str]
) -> Iterator[str]:
    """Yield the differences of the stored tensors that a node reads, each at its first reader."""
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    for place, name in enumerate(node.input):
        if name in seen or (name not in stored and name not in wanted):
            continue
        seen.add(name)
        role = _QUANTIZED_INPUTS.get(place, "codes") if quantizes else "weight"
        if name not in stored or name not in wanted:
            yield f"{role} {name!r} is stored in one of the graphs only"
        elif difference := _tensor_difference(stored[name], wanted[name]):
            yield f"{role} {name!r}: {difference}"


def _tensor_difference(found: TensorProto, expected: TensorProto) -> str | None:
    import numpy as np
    from onnx import TensorProto as Types
    from onnx import numpy_helper

    if found.data_type != expected.data_type or found.dims != expected.dims:
        actual, wanted = (f"{Types.DataType.Name(t.data_type)} {tuple(t.dims)}" for t in (found, expected))
        return f"{actual} instead of {wanted}"
    actual_values, expected_values = numpy_helper.to_array(found), numpy_helper.to_array(expected)
    if actual_values.tobytes() == expected_values.tobytes():
        return None
    first, second = (values.astype(np.float64).ravel() for values in (actual_values, expected_values))
    differing = np.flatnonzero(first != second)
    if not differing.size:  # zeros of opposite sign, or NaN
        return "the bits of some values differ"
    index = differing[0]
    return (
        f"{differing.size} of {first.size} values differ, first at {index}: {first[index]:.6g} instead of "
        f"{second[index]:.6g}"
    )


def _signatures(values: Iterable[ValueInfoProto]) -> list[tuple[str, int, tuple[str | int, ...]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


def _opsets(model: ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}
