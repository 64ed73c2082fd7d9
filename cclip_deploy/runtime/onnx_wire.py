"""Parse the structure of an ONNX file, a protocol buffer, without the onnx package.

Fields that exported graphs do not use are rejected, not skipped, because a runtime might read them. Weights are views
into the file and are not copied.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

VARINT, BYTES, FIXED32 = 0, 2, 5
MOST_FIELDS = 200_000
"""Limit for a file, which bounds the parsing time; a graph of rn101 has 15,000 fields."""
MOST_PACKED_BYTES = 10_000
"""Limit for a packed list of integers."""

Attribute = int | float | bytes | tuple[int, ...]


class GraphError(ValueError):
    """A file is not an ONNX graph of the form that exports have."""


@dataclass(frozen=True)
class Tensor:
    """A weight or constant; `data` is little-endian, `data_type` a TensorProto.DataType."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    data: memoryview = field(repr=False)


@dataclass(frozen=True)
class Node:
    """A node of the graph."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.op})"


@dataclass(frozen=True)
class Graph:
    """The graph of a model, and the version of each operator set by domain."""

    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Field(NamedTuple):
    """An allowed field: its wire type, and whether it may be repeated."""

    wire: int
    repeated: bool = False


_TEXT, _NUMBER, _MANY = _Field(BYTES), _Field(VARINT), _Field(BYTES, repeated=True)
_INTS = _Field(VARINT, repeated=True)

# Field numbers are those of onnx.proto.
_MODEL = {1: _NUMBER, 2: _TEXT, 3: _TEXT, 4: _TEXT, 5: _NUMBER, 6: _TEXT, 7: _Field(BYTES), 8: _MANY, 14: _MANY}
_OPSET = {1: _TEXT, 2: _NUMBER}
_GRAPH = {1: _MANY, 2: _TEXT, 5: _MANY, 10: _TEXT, 11: _MANY, 12: _MANY, 13: _MANY, 16: _MANY}
_NODE = {1: _MANY, 2: _MANY, 3: _TEXT, 4: _TEXT, 5: _MANY, 6: _TEXT, 7: _TEXT, 9: _MANY}
_ATTRIBUTE = {1: _TEXT, 2: _Field(FIXED32), 3: _NUMBER, 4: _TEXT, 8: _INTS, 13: _TEXT, 20: _NUMBER}
_TENSOR = {1: _INTS, 2: _NUMBER, 8: _TEXT, 9: _TEXT, 12: _TEXT, 14: _NUMBER, 16: _MANY}
_VALUE = {1: _TEXT, 2: _TEXT, 3: _TEXT, 4: _MANY}

_REFUSED = {
    ("model", 20): "training information",
    ("model", 25): "local functions",
    ("model", 26): "device configurations",
    ("graph", 14): "quantization annotations",
    ("graph", 15): "sparse weights",
    ("node", 8): "an overloaded function",
    ("node", 10): "device configurations",
    ("attribute", 5): "a tensor as an attribute",
    ("attribute", 6): "a subgraph",
    ("attribute", 7): "a list of numbers",
    ("attribute", 9): "a list of texts",
    ("attribute", 10): "tensors as an attribute",
    ("attribute", 11): "subgraphs",
    ("attribute", 21): "a reference to a function's attribute",
    ("attribute", 22): "sparse weights",
    ("attribute", 23): "sparse weights",
    ("tensor", 13): "external weights",
}
_ATTRIBUTE_VALUE = {1: 2, 2: 3, 3: 4, 7: 8}
"""The field of an attribute's value by AttributeProto.AttributeType: FLOAT, INT, STRING, INTS."""


def read_model(content: bytes) -> Graph:
    """Parse an ONNX file.

    Raises:
        GraphError: the bytes are not an ONNX model, contain a field that exports do not use (subgraphs, functions,
            sparse or external weights), a field twice, or more than `MOST_FIELDS` fields.
    """
    return _Reader().model(memoryview(content))


class _Message:
    """The fields of a message; absent fields have protobuf's default value."""

    def __init__(self, what: str, values: Mapping[int, list[Any]]) -> None:
        self.what = what
        self._values = values

    def number(self, key: int) -> int:
        return _signed(self._values.get(key, [0])[0])

    def view(self, key: int) -> memoryview:
        found: memoryview = self._values.get(key, [memoryview(b"")])[0]
        return found

    def views(self, key: int) -> list[memoryview]:
        return self._values.get(key, [])

    def text(self, key: int) -> str:
        return read_text(self.view(key), self.what)

    def texts(self, key: int) -> tuple[str, ...]:
        return tuple(read_text(view, self.what) for view in self.views(key))

    def integers(self, key: int) -> tuple[int, ...]:
        """Return a repeated integer field, packed or not."""
        found: list[int] = []
        for value in self._values.get(key, []):
            found += [value] if isinstance(value, int) else _unpacked(value)
        return tuple(_signed(number) for number in found)


class _Reader:
    """Parses messages and limits the number of fields."""

    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def model(self, view: memoryview) -> Graph:
        model = self._message("model", view, _MODEL)
        if not model.view(7):
            raise GraphError("it has no graph")
        opsets = [self._message("operator set", opset, _OPSET) for opset in model.views(8)]
        graph = self._message("graph", model.view(7), _GRAPH)
        return Graph(
            opsets={opset.text(1): opset.number(2) for opset in opsets},
            nodes=tuple(self._node(node) for node in graph.views(1)),
            initializers=tuple(self._tensor(tensor) for tensor in graph.views(5)),
            inputs=self._names(graph.views(11)),
            outputs=self._names(graph.views(12)),
        )

    def _names(self, values: Sequence[memoryview]) -> tuple[str, ...]:
        return tuple(self._message("input or output", value, _VALUE).text(1) for value in values)

    def _node(self, view: memoryview) -> Node:
        node = self._message("node", view, _NODE)
        attributes = dict(self._attribute(attribute) for attribute in node.views(5))
        if len(attributes) < len(node.views(5)):
            raise GraphError(f"node {node.text(3)!r} has an attribute twice")
        return Node(node.text(4), node.text(7), node.text(3), node.texts(1), node.texts(2), attributes)

    def _attribute(self, view: memoryview) -> tuple[str, Attribute]:
        attribute = self._message("attribute", view, _ATTRIBUTE)
        name, kind = attribute.text(1), attribute.number(20)
        if kind not in _ATTRIBUTE_VALUE:
            raise GraphError(f"attribute {name!r} has type {kind}, which exports do not use")
        values: dict[int, Attribute] = {
            1: struct.unpack("<f", attribute.view(2) or bytes(4))[0],
            2: attribute.number(3),
            3: bytes(attribute.view(4)),
            7: attribute.integers(8),
        }
        return name, values[kind]

    def _tensor(self, view: memoryview) -> Tensor:
        tensor = self._message("tensor", view, _TENSOR)
        name = tensor.text(8)
        if tensor.number(14):
            raise GraphError(f"tensor {name!r} has its external weights")
        return Tensor(name, tensor.number(2), tensor.integers(1), tensor.view(9))

    def _message(self, what: str, view: memoryview, known: Mapping[int, _Field]) -> _Message:
        values: dict[int, list[Any]] = {}
        position = 0
        while position < len(view):
            self._left -= 1
            if self._left < 0:
                raise GraphError(f"it has more than {MOST_FIELDS} fields")
            key, position = read_varint(view, position)
            number, wire = key >> 3, key & 7
            if number not in known:
                raise GraphError(
                    f"a {what} has {_REFUSED.get((what, number), f'field {number}')}, which exports do not use"
                )
            expected = known[number]
            if wire != expected.wire and not (expected is _INTS and wire == BYTES):
                raise GraphError(f"field {number} of a {what} has wire type {wire}")
            if number in values and not expected.repeated:
                raise GraphError(f"field {number} of a {what} occurs twice")
            value, position = read_value(view, position, wire)
            values.setdefault(number, []).append(value)
        return _Message(what, values)


def read_value(view: memoryview, position: int, wire: int) -> tuple[int | memoryview, int]:
    """Return a field's content and the position after it."""
    if wire == VARINT:
        return read_varint(view, position)
    length, position = (4, position) if wire == FIXED32 else read_varint(view, position)
    if length > len(view) - position:
        raise GraphError("it ends in the middle of a field")
    return view[position : position + length], position + length


def read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """Return a number of at most 64 bits and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise GraphError("it ends in the middle of a number")
        byte = view[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & (2**64 - 1), position
    raise GraphError("a number has more than 64 bits")


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _unpacked(view: memoryview) -> list[int]:
    if len(view) > MOST_PACKED_BYTES:
        raise GraphError(f"a list of integers has {len(view)} bytes")
    numbers, position = [], 0
    while position < len(view):
        number, position = read_varint(view, position)
        numbers.append(number)
    return numbers


def read_text(view: memoryview, what: str) -> str:
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise GraphError(f"a name of a {what} is not UTF-8") from error
