"""Check that low-precision graphs are conversions of the bundle's FP32 graphs with the recorded ranges."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.errors import CclipError
from cclip_deploy.parity.compare import Check
from cclip_deploy.parity.reference import Reference
from cclip_deploy.quantization.record import read_record
from cclip_deploy.runtime.graph_model import load_model

if TYPE_CHECKING:
    from onnx import ModelProto

    from cclip_deploy.graph.precision.convert import InputsAndOutputs

Progress = Callable[[str], None]

BACKEND = "onnx"
DIFFERENCES_COUNTED = 100
LAYERS_SHOWN = 3


def derivation_checks(
    bundle: Bundle, references: Sequence[Reference], on_progress: Progress = lambda _: None
) -> tuple[list[Check], list[str]]:
    """Convert every low-precision graph again, compare it with the bundle's, and compare its layers with FP32.

    Returns:
        The checks, and notes on what could not be checked. Without the package onnx, there are no checks.
    """
    low = [name for name, entry in bundle.manifest.graphs.items() if entry.precision != "fp32"]
    if not low:
        return [], []
    if importlib.util.find_spec("onnx") is None:
        return [], [
            f"{', '.join(low)} were checked by their outputs only: converting FP32 again and comparing nodes needs the "
            "package onnx."
        ]
    checks: list[Check] = []
    for name in low:
        on_progress(f"Converting {name} again from FP32")
        found, full = _models(bundle, name)
        checks.append(_derivation_check(bundle, name, found, full))
        checks += layer_checks(bundle, name, references, (found, full))
    unrecorded = [name for name in low if bundle.graph(name).high_precision_nodes is None]
    if not unrecorded:
        return checks, []
    return checks, [
        f"The bundle does not record which products of {', '.join(unrecorded)} are in a higher precision; this was "
        "read from the graphs. Build them again to record it."
    ]


def layer_checks(
    bundle: Bundle, name: str, references: Sequence[Reference], models: tuple[ModelProto, ModelProto] | None = None
) -> list[Check]:
    """Check the layers of a low-precision graph against FP32 on the last reference; the value is the worst layer's.

    Args:
        bundle: holds both graphs.
        name: manifest key of the graph.
        references: of the bundle.
        models: the graph and its FP32 graph, if they are loaded already.
    """
    from cclip_deploy.parity.layers import layer_errors, layer_limit

    entry, graph = bundle.graph(name), name.split(".")[0]
    found, full = models or _models(bundle, name)
    one_image = replace(references[-1], image=references[-1].image[:1])
    errors = layer_errors(found, full, entry.precision, one_image.inputs_of(graph))
    if not errors:
        return []
    limit = layer_limit(entry.precision)
    worst = max(errors, key=lambda layer: np.inf if np.isnan(layer.error) else layer.error)
    wrong = [layer for layer in errors if not layer.error <= limit]
    listed = ", ".join(f"node {layer.node!r} ({layer.op_type}): {layer.error:.3g}" for layer in wrong[:LAYERS_SHOWN])
    return [
        Check(
            f"{graph}/layers", graph, BACKEND, entry.precision, "layer_error", worst.error, limit, not wrong,
            f"{len(wrong)} of {len(errors)} layers: {listed}" if wrong else None,
        )
    ]  # fmt: skip


def _models(bundle: Bundle, name: str) -> tuple[ModelProto, ModelProto]:
    """Load a low-precision graph and its FP32 graph."""
    return load_model(bundle, name), load_model(bundle, name.split(".")[0])


def _derivation_check(bundle: Bundle, name: str, found: ModelProto, full: ModelProto) -> Check:
    from cclip_deploy.graph.compare import differences
    from cclip_deploy.graph.precision.convert import convert_graph, high_precision_products

    entry, graph = bundle.graph(name), name.split(".")[0]
    keep = entry.high_precision_nodes
    if keep is None:
        keep = tuple(sorted(high_precision_products(found, full, entry.precision)))
    ranges = read_record(bundle, entry).ranges if entry.calibration else None
    try:
        expected = convert_graph(full, entry.precision, ranges, keep, _io_of(entry)).model
        faults = list(islice(differences(found, expected), DIFFERENCES_COUNTED))
    except CclipError as error:
        faults = [f"FP32 cannot be converted to {entry.precision} with the recorded ranges: {error}"]
    detail = f"{faults[0]}, unlike the conversion of FP32 with the recorded ranges" if faults else None
    return Check(
        f"{graph}/derivation", graph, BACKEND, entry.precision, "differences", len(faults), 0.0, not faults, detail
    )


def _io_of(entry: GraphEntry) -> InputsAndOutputs:
    return "fp16" if any(tensor.dtype == "float16" for tensor in (*entry.inputs, *entry.outputs)) else "fp32"
