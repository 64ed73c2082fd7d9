"""Insert the weights that a graph shares with other graphs of its bundle. Needs neither onnx nor a runtime.

`export` stores the weights of `fused` once. They are external data, as ONNX defines it: the file is the ONNX file of
another graph, the offset that of the weight in it. The metadata pins the SHA-256 of each such file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from cclip_deploy.runtime.onnx_wire import BYTES, MOST_FIELDS, GraphError, read_text, read_value, read_varint

PIN = "weights_sha256:"
"""Prefix of the metadata keys that pin a file, before its name."""

# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_METADATA, GRAPH_INITIALIZER = 7, 14, 5
TENSOR_RAW_DATA, TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION = 9, 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
EXTERNAL = 1
MOST_DIGITS = 18


class Field(NamedTuple):
    """A field of a message: its number, its value, and all its bytes."""

    number: int
    value: int | memoryview
    encoded: memoryview


def pinned_files(content: bytes) -> dict[str, str]:
    """Return the SHA-256 of each file that a graph takes weights from, by name; empty if it has all its weights."""
    entries = (_entry(field) for field in _fields(memoryview(content)) if field.number == MODEL_METADATA)
    return {key.removeprefix(PIN): value for key, value in entries if key.startswith(PIN)}


def insert_weights(content: bytes, files: Mapping[str, bytes]) -> bytes:
    """Return an ONNX file with the weights that it takes from other files, and without the pins.

    Args:
        content: an ONNX file.
        files: content of the other files by name.

    Raises:
        GraphError: a weight is in another file, outside of a file, or all weights together are longer than the files.
    """
    inserter = _Inserter(files)
    parts: list[bytes | memoryview] = []
    for field in _fields(memoryview(content)):
        if field.number == MODEL_GRAPH:
            parts += _message(MODEL_GRAPH, inserter.graph(_view(field)))
        elif field.number != MODEL_METADATA or not _entry(field)[0].startswith(PIN):
            parts.append(field.encoded)
    return b"".join(parts)


def resolved(content: bytes, read: Callable[[str, str], bytes]) -> bytes:
    """Return an ONNX file with all its weights.

    Args:
        content: an ONNX file.
        read: returns the content of another file by name, after comparing its SHA-256 with a given one.

    Raises:
        GraphError: see `insert_weights`.
    """
    pins = pinned_files(content)
    return insert_weights(content, {name: read(name, pin) for name, pin in pins.items()}) if pins else content


class _Inserter:
    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self._left = sum(len(content) for content in files.values())

    def graph(self, view: memoryview) -> list[bytes | memoryview]:
        parts: list[bytes | memoryview] = []
        for field in _fields(view):
            is_weight = field.number == GRAPH_INITIALIZER
            parts += _message(GRAPH_INITIALIZER, self._tensor(_view(field))) if is_weight else [field.encoded]
        return parts

    def _tensor(self, view: memoryview) -> list[bytes | memoryview]:
        fields = list(_fields(view))
        entries = [_entry(field) for field in fields if field.number == TENSOR_EXTERNAL_DATA]
        if not entries:
            return [view]
        if [field.value for field in fields if field.number == TENSOR_DATA_LOCATION] != [EXTERNAL]:
            raise GraphError("a weight has a place in another file and its own bytes")
        rest = [f.encoded for f in fields if f.number not in (TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION)]
        return [*rest, *_message(TENSOR_RAW_DATA, [self._data(entries)])]

    def _data(self, entries: list[tuple[str, str]]) -> memoryview:
        place = dict(entries)
        if len(entries) != 3 or place.keys() != {"location", "offset", "length"}:
            raise GraphError(f"a weight has its place as {entries}, not as location, offset and length")
        name = place["location"]
        if name not in self._files:
            raise GraphError(f"a weight is in {name!r}, whose SHA-256 the graph does not pin")
        offset, length = _number(place["offset"]), _number(place["length"])
        if offset + length > len(self._files[name]):
            raise GraphError(f"a weight has {length} bytes at {offset} in {name!r}, which is shorter")
        self._left -= length
        if self._left < 0:
            raise GraphError("its weights are longer than the files that they are in")
        return memoryview(self._files[name])[offset : offset + length]


def _fields(view: memoryview) -> Iterator[Field]:
    position = 0
    for _ in range(MOST_FIELDS):
        if position == len(view):
            return
        key, after = read_varint(view, position)
        value, end = read_value(view, after, key & 7)
        yield Field(key >> 3, value, view[position:end])
        position = end
    raise GraphError(f"it has more than {MOST_FIELDS} fields")


def _view(field: Field) -> memoryview:
    if isinstance(field.value, int):
        raise GraphError(f"field {field.number} is a number")
    return field.value


def _entry(field: Field) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    found = {part.number: read_text(_view(part), "key or value") for part in _fields(_view(field))}
    return found.get(ENTRY_KEY, ""), found.get(ENTRY_VALUE, "")


def _number(digits: str) -> int:
    if not digits.isascii() or not digits.isdigit() or len(digits) > MOST_DIGITS:
        raise GraphError(f"a weight has the offset or length {digits[:40]!r}")
    return int(digits)


def _message(number: int, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the encoding of a field of bytes."""
    return [_varint(number << 3 | BYTES), _varint(sum(len(part) for part in parts)), *parts]


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
