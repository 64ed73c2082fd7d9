"""Prove the precision of engines without a GPU, from the layer record of their build.

TensorRT opens an engine only on its GPU. A record is therefore checked by the hashes of its engine and graph, by marks
that every engine file has (observed in TensorRT-RTX 1.7), and by the layers, which are analyzed again each time.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cclip_deploy.bundle.bundle import RECORD_BYTES, Bundle
from cclip_deploy.bundle.manifest import EngineEntry, GraphEntry, graph_key
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import BundleError, ParityError
from cclip_deploy.parity.compare import Check
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.tensorrt.builder import BuiltEngine
from cclip_deploy.runtime.tensorrt.layers import LayerTable, product_nodes, prove_precision

MAGIC = {"tensorrt-rtx": (b"vtrt",), "tensorrt": (b"ftrt", b"ptrt")}
"""First bytes of engine files. Those of TensorRT are taken from published tools and were not tested."""
LENGTH_BYTES = slice(16, 24)
"""Position of the file length in a TensorRT-RTX engine, little-endian."""
NODE = "[ONNX Layer: {}]"
"""Form in which a TensorRT-RTX engine contains the name of an ONNX node."""


def proof_record(built: BuiltEngine, precision: Precision, engine_sha256: str, graph_sha256: str) -> dict[str, Any]:
    """Return the JSON record of a built engine."""
    return {
        "asked": precision,
        "engine_sha256": engine_sha256,
        "graph_sha256": graph_sha256,
        "products": sorted(built.products),
        "kept": sorted(built.high_precision_nodes),
        **built.layers.to_dict(),
    }


def engine_checks(bundle: Bundle) -> tuple[list[Check], list[str]]:
    """Check the precision and graph of each engine without running it.

    Returns:
        The checks, and notes on engines that are not proved or that run some products in a higher precision.

    Raises:
        BundleError: an engine's record is not a layer table.
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
                f"{engine.precision.product_type}, the others in {engine.precision.high_precision}."
            )
        measured = {"precision_honoured": reason is None, "graph_unchanged": graph.sha256 == engine.graph_sha256}
        for metric, holds in measured.items():
            name = f"{engine.graph}/engine/{metric}"
            checks.append(
                Check(name, engine.graph, engine.backend, engine.precision, metric, float(holds), 1.0, bool(holds))
            )
    return checks, notes


def _why_not_proved(bundle: Bundle, engine: EngineEntry, graph: GraphEntry, record: Mapping[str, Any]) -> str | None:
    """Return why an engine is not proved to be built from a graph in its precision; None if it is proved."""
    if "engine_sha256" not in record or "graph_sha256" not in record:
        return "its record has no hashes of its engine and graph. Build the engine again."
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
    """Parse a record and its layer table; raise BundleError if it is invalid."""
    try:
        record = json.loads(content)
        lists = {name: frozenset(record.get(name, ())) for name in ("products", "kept")}
        if "products" not in record:
            raise KeyError("products")
        return {**record, **lists, "table": LayerTable.from_dict(record)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is not a layer table: {error!r}. Build the engine again.") from error


def _why_no_engine(content: bytes, engine: EngineEntry, graph: GraphEntry, table: LayerTable) -> str | None:
    """Return why bytes are not an engine with a graph's inputs and outputs and a table's nodes; None if they are."""
    magic = MAGIC.get(engine.backend, ())
    if len(content) < LENGTH_BYTES.stop:
        return f"the file is not a {engine.backend} engine."
    if not content[:4].startswith(magic):
        return f"the file is not a {engine.backend} engine: it starts with {content[:4]!r}."
    names = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
    if engine.backend == "tensorrt-rtx":
        length = int.from_bytes(content[LENGTH_BYTES], "little")
        if length != len(content):
            return f"the engine is truncated or extended: it has {len(content)} bytes, its header gives {length}."
        names += [NODE.format(node) for node in sorted({node for row in table.rows for node in row.origins})]
    missing = next((name for name in names if name.encode() not in content), None)
    return None if missing is None else f"the file does not contain {missing} of its graph: it is another engine."


def _why_other_products(bundle: Bundle, engine: EngineEntry, record: Mapping[str, Any]) -> str | None:
    """Return why the products of a record are not its graph's; None if they are, or onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return None
    precision, model = engine.precision, load_model(bundle, graph_key(engine.graph, engine.precision))
    products = product_nodes(model)
    if record["products"] != products:
        other = sorted(record["products"] ^ products)
        return f"its record and its graph differ in their products; first: {other[0]}."
    if precision.is_quantized:
        codes = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        quantized = {node.name for node in model.graph.node if not codes.isdisjoint(node.input)}
        if other := sorted(record["kept"] ^ (products - quantized)):
            return f"its record and its graph differ in the products in a higher precision; first: {other[0]}."
    return None


def _why_no_precision(record: Mapping[str, Any], precision: Precision) -> str | None:
    try:
        prove_precision(record["table"], precision, record["products"], record["kept"])
    except ParityError as error:
        return str(error)
    return None
