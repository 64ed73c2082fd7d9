"""The record beside an engine: the layers of its build, and the engine and graph that they belong to, by their hashes.

TensorRT opens an engine only where its GPU is. So what a record proves rests on its hashes, on marks that every engine
of the binding has (read from real builds of TensorRT-RTX 1.7), and on the layers themselves, judged anew each time.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cclip_deploy.bundle.bundle import RECORD_BYTES, Bundle
from cclip_deploy.bundle.manifest import EngineEntry, GraphEntry, graph_key
from cclip_deploy.bundle.precision import Precision, is_quantized, product_type, rest_type
from cclip_deploy.errors import BundleError, ParityError
from cclip_deploy.parity.compare import Check
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.tensorrt.builder import BuiltEngine
from cclip_deploy.runtime.tensorrt.layers import LayerTable, product_nodes, prove_precision

MAGIC = {"tensorrt-rtx": (b"vtrt",), "tensorrt": (b"ftrt", b"ptrt")}
"""How a serialized engine begins. Plain TensorRT's are those that published tools look for: none was built here."""
LENGTH_BYTES = slice(16, 24)
"""Where a TensorRT-RTX engine holds its own length, little-endian."""
NODE = "[ONNX Layer: {}]"
"""How a TensorRT-RTX engine holds the name of an ONNX node."""


def proof_record(built: BuiltEngine, precision: Precision, engine_sha256: str, graph_sha256: str) -> dict[str, Any]:
    """The record of a built engine in plain JSON form."""
    return {
        "asked": precision,
        "engine_sha256": engine_sha256,
        "graph_sha256": graph_sha256,
        "products": sorted(built.products),
        "kept": sorted(built.high_precision_nodes),
        **built.layers.to_dict(),
    }


def engine_checks(bundle: Bundle) -> tuple[list[Check], list[str]]:
    """Each engine's precision and graph, checked without running it, and notes on what is proved of it or why nothing.

    Raises:
        BundleError: an engine's record is no layer table.
    """
    checks, notes = [], []
    for engine in bundle.manifest.engines:
        graph = bundle.graph(graph_key(engine.graph, engine.precision))
        record = _read_record(bundle.read(engine.layers, RECORD_BYTES), bundle.path / engine.layers)
        reason = _why_not_proved(bundle, engine, graph, record)
        if reason is not None:
            notes.append(f"{engine.file} is not proved to run in {engine.precision}: {reason}")
        elif record["kept"]:
            products, kept = len(record["products"]), len(record["kept"])
            notes.append(
                f"{engine.file} runs {products - kept} of {products} convolutions and matrix products in "
                f"{product_type(engine.precision)}, the others in {rest_type(engine.precision)}."
            )
        measured = {"precision_honoured": reason is None, "graph_unchanged": graph.sha256 == engine.graph_sha256}
        for metric, holds in measured.items():
            name = f"{engine.graph}/engine/{metric}"
            checks.append(
                Check(name, engine.graph, engine.backend, engine.precision, metric, float(holds), 1.0, bool(holds))
            )
    return checks, notes


def _why_not_proved(bundle: Bundle, engine: EngineEntry, graph: GraphEntry, record: Mapping[str, Any]) -> str | None:
    """Why nothing proves that an engine is a graph's, in its precision; None where its record proves it."""
    if "engine_sha256" not in record or "graph_sha256" not in record:
        return "its record does not say which engine it belongs to. Build the engine again."
    if record["engine_sha256"] != engine.sha256:
        return "its record belongs to another engine. Build the engine again."
    if record["graph_sha256"] != graph.sha256:
        return "its record belongs to another graph. Build the engine again."
    return (
        _why_no_engine(bundle.read(engine.file), engine, graph, record["table"])
        or _why_other_products(bundle, engine, record)
        or _why_no_precision(record, engine.precision)
    )


def _read_record(content: bytes, path: Path) -> Mapping[str, Any]:
    """A record with its `table` read; BundleError where it is none."""
    try:
        record = json.loads(content)
        lists = {name: frozenset(record.get(name, ())) for name in ("products", "kept")}
        if "products" not in record:
            raise KeyError("products")
        return {**record, **lists, "table": LayerTable.from_dict(record)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is no layer table: {error!r}. Build the engine again.") from error


def _why_no_engine(content: bytes, engine: EngineEntry, graph: GraphEntry, table: LayerTable) -> str | None:
    """Why bytes are not an engine of its binding with a graph's inputs and outputs and a table's nodes."""
    magic = MAGIC.get(engine.backend, ())
    if len(content) < LENGTH_BYTES.stop:
        return f"the file is no {engine.backend} engine."
    if not content[:4].startswith(magic):
        return f"the file is no {engine.backend} engine: it begins with {content[:4]!r}."
    names = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
    if engine.backend == "tensorrt-rtx":
        length = int.from_bytes(content[LENGTH_BYTES], "little")
        if length != len(content):
            return f"the file is no whole engine: it has {len(content)} bytes, its header says {length}."
        names += [NODE.format(node) for node in sorted({node for row in table.rows for node in row.origins})]
    missing = next((name for name in names if name.encode() not in content), None)
    return None if missing is None else f"{missing} of its graph does not occur in the file: it is another engine."


def _why_other_products(bundle: Bundle, engine: EngineEntry, record: Mapping[str, Any]) -> str | None:
    """Why the products of a record are not those of its graph; None, too, where the package onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return None
    precision, model = engine.precision, load_model(bundle, graph_key(engine.graph, engine.precision))
    products = product_nodes(model)
    if record["products"] != products:
        other = sorted(record["products"] ^ products)
        return f"its record does not name the graph's own products; {other[0]} is not in both."
    if is_quantized(precision):
        codes = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        quantized = {node.name for node in model.graph.node if not codes.isdisjoint(node.input)}
        if other := sorted(record["kept"] ^ (products - quantized)):
            return f"its record and its graph differ in what is kept out of {precision}; first: {other[0]}."
    return None


def _why_no_precision(record: Mapping[str, Any], precision: Precision) -> str | None:
    try:
        prove_precision(record["table"], precision, record["products"], record["kept"])
    except ParityError as error:
        return str(error)
    return None
