"""Layer table of an engine, read from the build log, and the check that its layers run in the requested precision.

TensorRT and TensorRT-RTX write the same table into the verbose build log if the profiling verbosity is detailed: one
line per layer, with its kind, tensors, types, and the ONNX nodes it came from. Unlike the engine inspector, the build
log needs no GPU.
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
"""ONNX operators that are convolutions or matrix products, to which a precision applies."""

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
LEAST_FRACTION = 1 / 3
"""An engine must run more than this fraction of its products in the precision that it is named after."""


@dataclass(frozen=True)
class LayerTable:
    """All layers of an engine, from its build log."""

    rows: tuple[LayerRow, ...]

    def summary(self) -> dict[str, int]:
        """Return the number of layers by precision, for example {"fp16": 210, "mixed": 6, "none": 1}."""
        return dict(Counter(row.precision for row in self.rows).most_common())

    def product_summary(self) -> dict[str, int]:
        """Return the number of convolution and matrix product layers by precision."""
        return dict(Counter(row.precision for row in self.rows if row.is_product).most_common())

    def rows_of(self, node: str) -> tuple[LayerRow, ...]:
        """Return the layers of an ONNX product node: those known to be products, otherwise all that name the node."""
        naming = tuple(row for row in self.rows if node in row.origins)
        return tuple(row for row in naming if row.is_product) or naming

    def to_dict(self) -> dict[str, Any]:
        """Return the plain JSON form that `from_dict` reads."""
        return {"layers": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerTable:
        """Read the form that `to_dict` returned; raise DataError for anything else."""
        try:
            return LayerTable(tuple(_row_from_dict(row) for row in values["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"Not a layer table: {error!r}. Build the engine again.") from error


def read_layer_table(log: Iterable[str]) -> LayerTable:
    """Read the last layer table among the messages of a verbose build log.

    Raises:
        ParityError: there is no table, or a line of it cannot be parsed.
    """
    tables = [message[len(_TABLE_HEAD) :] for message in log if message.startswith(_TABLE_HEAD)]
    if not tables:
        raise ParityError(
            "The build log has no layer table, so the precision of the engine cannot be checked. "
            "Build it with detailed profiling verbosity and a verbose logger."
        )
    lines = takewhile(lambda line: not line.startswith(_AFTER_TABLE), tables[-1].split("\n"))
    rows = tuple(_read_row(line) for line in lines if line)
    if not rows:
        raise ParityError("The build log's layer table is empty, so the precision of the engine cannot be checked.")
    return LayerTable(rows)


def product_nodes(graph: ModelProto) -> frozenset[str]:
    """Return the names of the convolutions and matrix products that depend on a graph input.

    A node without a name gets the name that the ONNX parser gives it: `node_of_` and its first output.
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
    table: LayerTable, requested: Precision, products: Collection[str], high_precision_nodes: Collection[str] = ()
) -> None:
    """Raise ParityError unless every convolution and matrix product of the graph runs in the requested precision.

    Each product must appear in a layer of a known product kind whose activations and weights all have the requested
    type; for high-precision nodes, the type of the unquantized rest. A layer of an unknown kind is rejected if it
    processes floating-point or quantized data, because it could contain a product. For FP32 no layer may have a
    narrower type at all (the table does not show TF32).

    Args:
        table: the engine's layers.
        requested: the precision.
        products: node names, from `product_nodes`.
        high_precision_nodes: products that must run in the precision of the rest; fewer than two thirds of all.
    """
    requested = parse_precision(requested)
    names = sorted(products)
    high = [node for node in names if node in high_precision_nodes]
    if len(high) == len(names):
        raise ParityError("The graph has no convolution or matrix product, so its precision cannot be checked.")
    if len(names) - len(high) <= LEAST_FRACTION * len(names):
        raise ParityError(
            f"{requested.upper()} was requested, but {len(high)} of {len(names)} convolutions and matrix products stay "
            f"in {requested.high_precision.upper()}. Give fewer --keep, or build in {requested.high_precision}."
        )
    expected = {node: requested.high_precision if node in high else requested.product_type for node in names}
    faults = [fault for node, kind in expected.items() if (fault := _fault_of(node, table.rows_of(node), kind))]
    others = [reason for row in table.rows if (reason := _violation_of(row, requested, products))]
    if faults or others:
        raise ParityError(
            f"{requested.upper()} was requested, but the engine does not run in it: {len(faults)} of {len(expected)} "
            f"convolutions and matrix products{_first_few(faults)} and {len(others)} other layers{_first_few(others)}. "
            f"Convert the graph to {requested.upper()} first; builder flags do not change its types."
        )


def _fault_of(node: str, rows: tuple[LayerRow, ...], expected: str) -> str | None:
    """Return why a product node is not proved to run in a type, or None if it is."""
    if not rows:
        return f"{node} (in no layer)"
    for row in rows:
        if not row.is_product and not row.is_unrolled_product:
            return f"{node} ({row.kind}, {row.precision}) appears only in {row.name}, not known to be a product"
        if row.precision != expected:
            return f"{node} ({row.kind}, {row.precision})"
    return None


def _violation_of(row: LayerRow, requested: Precision, products: Collection[str]) -> str | None:
    """Return why a layer that is none of the named products violates the precision, or None if it does not."""
    label = f"{row.name} ({row.kind}, {'+'.join(sorted(row.types))})"
    if requested == "fp32" and row.types - {"fp32"}:
        return label
    if row.role == "unknown" and row.types:
        return f"{label} is of an unknown kind"
    allowed = {requested.product_type, requested.rest}
    is_named = not set(products).isdisjoint(row.origins)
    return label if row.is_product and not is_named and row.precision not in allowed else None


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
    """Parse the weights of a plain TensorRT layer, of which the log shows only type and count."""
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
    raise ParityError(f"The build log's layer table has an unknown tensor type: {text!r}. Please report it.")


def _row_from_dict(values: dict[str, Any]) -> LayerRow:
    tensors = {
        field: tuple(LayerTensor(t["name"], tuple(int(n) for n in t["dims"]), str(t["type"])) for t in values[field])
        for field in ("inputs", "constants", "outputs")
    }
    return LayerRow(name=values["name"], kind=values["kind"], origins=tuple(values["origins"]), **tensors)
