"""What an engine's layers run in, read from the build log, and the proof that this is the requested precision.

TensorRT and TensorRT-RTX write the same table into the verbose build log when the profiling verbosity is detailed: a
line a layer, with its kind, its tensors and their types, and the ONNX nodes it came from. The build log needs no GPU;
the engine inspector does.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.precision import Precision, parse_precision
from cclip_deploy.errors import DataError, ParityError
from cclip_deploy.runtime.tensorrt.layer_row import FLAT_WEIGHTS, LayerRow, LayerTensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from onnx import ModelProto

PRODUCT_OPERATORS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""ONNX operators that are convolutions or matrix products: what a precision is asked for."""

_TABLE_HEAD = "Layers:\n"
_AFTER_TABLE = ("Bindings:", "I/O Tensors:", "Engine Metadata:")
_ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>(?: \{.*?\})?)\]"
    r"(?:, Constants: \[(?P<constants>(?: \{.*?\})?)\])?, Outputs: \[(?P<outputs>(?: \{.*?\})?)\](?P<rest>(?:,.*)?)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d,]*)\], (?:[^{}]*?, )?"
    r"(?:Format/)?Datatype: (?P<type>[^,}]*?)(?:, Format: [^}]*)?(?: ?\})"
)
_WEIGHTS = re.compile(r'\bWeights: \{"Type": "(?P<type>\w+)", "Count": (?P<count>\d+)\}')
_WEIGHTS_KEY = re.compile(r"\bWeights\b")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?:__\w+)?(?=\[ONNX Layer: |[\x1e\x1f]|$)")
_TYPES = (
    (re.compile(r"bfloat16|bf16", re.IGNORECASE), "bf16"),
    (re.compile(r"half|fp16|float16", re.IGNORECASE), "fp16"),
    (re.compile(r"fp8|float8|e8m0", re.IGNORECASE), "fp8"),
    (re.compile(r"fp4", re.IGNORECASE), "fp4"),
    (re.compile(r"float|fp32", re.IGNORECASE), "fp32"),
    (re.compile(r"uint8", re.IGNORECASE), "uint8"),
    (re.compile(r"int8", re.IGNORECASE), "int8"),
    (re.compile(r"int4", re.IGNORECASE), "int4"),
    (re.compile(r"int32", re.IGNORECASE), "int32"),
    (re.compile(r"int64", re.IGNORECASE), "int64"),
    (re.compile(r"bool", re.IGNORECASE), "bool"),
)
LEAST_SHARE = 1 / 3
"""An engine of a precision runs more than this part of its products in it: below, it is named for what it is not."""


@dataclass(frozen=True)
class LayerTable:
    """All layers of an engine, as its build logged them."""

    rows: tuple[LayerRow, ...]

    def summary(self) -> dict[str, int]:
        """Layers per precision, for example {"fp16": 210, "mixed": 6, "none": 1}."""
        return dict(Counter(row.precision for row in self.rows).most_common())

    def product_summary(self) -> dict[str, int]:
        """As `summary`, for the layers that are convolutions and matrix products."""
        return dict(Counter(row.precision for row in self.rows if row.is_product).most_common())

    def share(self, precision: str) -> float:
        """The part of the convolution and matrix product layers that run in `precision`, 0 to 1."""
        products = self.product_summary()
        return products.get(precision, 0) / max(1, sum(products.values()))

    def rows_of(self, node: str) -> tuple[LayerRow, ...]:
        """The layers that compute an ONNX product node: those known to be products, or else all that name it."""
        naming = tuple(row for row in self.rows if node in row.origins)
        return tuple(row for row in naming if row.is_product) or naming

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, to be stored beside the engine; `from_dict` reads it back."""
        return {"layers": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerTable:
        """The table that `to_dict` wrote; anything else is a DataError."""
        try:
            return LayerTable(tuple(_row_from_dict(row) for row in values["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"Not a layer table: {error!r}. Build the engine again.") from error


def read_layer_table(log: Iterable[str]) -> LayerTable:
    """The last layer table among the messages of a verbose build log.

    Raises:
        ParityError: no table, or a line of it that cannot be read; then nothing is known of the engine.
    """
    tables = [message[len(_TABLE_HEAD) :] for message in log if message.startswith(_TABLE_HEAD)]
    if not tables:
        raise ParityError(
            "The build log holds no layer table, so nothing shows which precision the engine runs in. "
            "Build it with detailed profiling verbosity and a verbose logger."
        )
    lines = takewhile(lambda line: not line.startswith(_AFTER_TABLE), tables[-1].split("\n"))
    rows = tuple(_read_row(line) for line in lines if line)
    if not rows:
        raise ParityError("The build log's layer table is empty, so nothing shows which precision the engine runs in.")
    return LayerTable(rows)


def product_nodes(graph: ModelProto) -> frozenset[str]:
    """Names of the nodes that are convolutions or matrix products and depend on an input.

    A node without a name is called what the ONNX parser calls it, `node_of_` and its first output.
    """
    varying = {value.name for value in graph.graph.input} - {tensor.name for tensor in graph.graph.initializer}
    products = set()
    for node in graph.graph.node:
        if varying.isdisjoint(node.input):
            continue
        varying.update(node.output)
        if node.op_type in PRODUCT_OPERATORS:
            products.add(node.name or f"node_of_{node.output[0]}")
    return frozenset(products)


def prove_precision(
    table: LayerTable, asked: Precision, products: Collection[str], kept_nodes: Collection[str] = ()
) -> None:
    """Raise ParityError unless every convolution and matrix product of the graph runs in the requested precision.

    What is not known is not proved. Each product must be named by a layer of a kind that is known to multiply, whose
    activations and weights all are in the type; the products kept out of the precision on purpose, in the rest's type.
    A layer of an unknown kind fails if it handles floating-point or quantized data, because it could hide a product.
    For FP32 no layer may hold a narrower type at all (TF32 inside an FP32 kernel does not show in the table).

    Args:
        table: the engine's layers.
        asked: the precision.
        products: node names, from `product_nodes`.
        kept_nodes: the products that the graph keeps in the rest's precision on purpose; fewer than two thirds of all.
    """
    asked = parse_precision(asked)
    names = sorted(products)
    kept = [node for node in names if node in kept_nodes]
    if len(kept) == len(names):
        raise ParityError("The graph has no convolution or matrix product, so no precision can be proved.")
    if len(names) - len(kept) <= LEAST_SHARE * len(names):
        raise ParityError(
            f"{asked.upper()} was asked for, but {len(kept)} of {len(names)} convolutions and matrix products are kept "
            f"in {asked.high_precision.upper()}. Keep fewer, or build in {asked.high_precision}."
        )
    expected = {node: asked.high_precision if node in kept else asked.product_type for node in names}
    faults = [fault for node, kind in expected.items() if (fault := _fault_of(node, table.rows_of(node), kind))]
    strays = [stray for row in table.rows if (stray := _stray_of(row, asked, products))]
    if faults or strays:
        raise ParityError(
            f"{asked.upper()} was asked for, but the engine does not run in it: {len(faults)} of {len(expected)} "
            f"convolutions and matrix products{_first_few(faults)} and {len(strays)} other layers{_first_few(strays)}. "
            f"Give the builder a graph that is {asked.upper()} itself; no flag makes it so."
        )


def _fault_of(node: str, rows: tuple[LayerRow, ...], expected: str) -> str | None:
    """Why a product node is not proved to run in a type; None where it is."""
    if not rows:
        return f"{node} (in no layer)"
    for row in rows:
        if not row.is_product and not row.is_unrolled_product:
            return f"{node} ({row.kind}, {row.precision}) is named only by {row.name}, not known to multiply"
        if row.precision != expected:
            return f"{node} ({row.kind}, {row.precision})"
    return None


def _stray_of(row: LayerRow, asked: Precision, products: Collection[str]) -> str | None:
    """What a layer that is not one of the named products has against the precision; None where it has nothing."""
    told = f"{row.name} ({row.kind}, {'+'.join(sorted(row.types))})"
    if asked == "fp32" and row.types - {"fp32"}:
        return told
    if row.role == "unknown" and row.types:
        return f"{told} is of an unknown kind"
    fitting = {asked.product_type, asked.rest}
    is_named = not set(products).isdisjoint(row.origins)
    return told if row.is_product and not is_named and row.precision not in fitting else None


def _first_few(faults: list[str]) -> str:
    few = "; ".join(faults[:5]) + ("; ..." if len(faults) > 5 else "")
    return f" [{few}]" if few else ""


def _read_row(line: str) -> LayerRow:
    found = _ROW.fullmatch(line)
    if found is None:
        raise ParityError(f"A line of the build log's layer table cannot be read: {line[:200]!r}. Please report it.")
    weights = _read_weights(found["rest"].partition("Metadata: ")[0])
    return LayerRow(
        name=found["name"],
        kind=found["kind"],
        inputs=_read_tensors(found["inputs"]),
        constants=_read_tensors(found["constants"] or "") + weights,
        outputs=_read_tensors(found["outputs"]),
        origins=tuple(_ORIGIN.findall(found["rest"].partition("Metadata: ")[2])),
    )


def _read_weights(text: str) -> tuple[LayerTensor, ...]:
    """Plain TensorRT's weights, of which a layer shows only type and count."""
    weights = tuple(LayerTensor(FLAT_WEIGHTS, (int(w["count"]),), _type_of(w["type"])) for w in _WEIGHTS.finditer(text))
    if len(weights) != len(_WEIGHTS_KEY.findall(text)):
        raise ParityError(f"Weights in the build log's layer table cannot be read: {text[:200]!r}. Please report it.")
    return weights


def _read_tensors(text: str) -> tuple[LayerTensor, ...]:
    tensors = tuple(
        LayerTensor(
            found["name"], tuple(int(size) for size in found["dims"].split(",") if size), _type_of(found["type"])
        )
        for found in _TENSOR.finditer(text)
    )
    if len(tensors) != text.count("{ Name: "):
        raise ParityError(f"Tensors of the build log's layer table cannot be read: {text[:200]!r}. Please report it.")
    return tensors


def _type_of(text: str) -> str:
    for pattern, name in _TYPES:
        if pattern.search(text):
            return name
    raise ParityError(
        f"The build log's layer table has a tensor type that is not known here: {text!r}. Please report it."
    )


def _row_from_dict(values: dict[str, Any]) -> LayerRow:
    tensors = {
        field: tuple(LayerTensor(t["name"], tuple(int(n) for n in t["dims"]), str(t["type"])) for t in values[field])
        for field in ("inputs", "constants", "outputs")
    }
    return LayerRow(name=values["name"], kind=values["kind"], origins=tuple(values["origins"]), **tensors)
