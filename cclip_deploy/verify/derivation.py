"""Check low-precision graphs against what the bundle's FP32 graphs and recorded ranges give, node by node."""

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
    """Derive every low-precision graph again and compare it with the bundle's, then compare layer by layer.

    Returns the checks, and notes on what could not be checked: without the package onnx, nothing.
    """
    low = [name for name, entry in bundle.manifest.graphs.items() if entry.precision != "fp32"]
    if not low:
        return [], []
    if importlib.util.find_spec("onnx") is None:
        return [], [
            f"{', '.join(low)} could not be derived again from FP32 and compared node by node, which needs the package "
            "onnx; judged by their outputs alone."
        ]
    checks: list[Check] = []
    for name in low:
        on_progress(f"Deriving {name} again from FP32")
        found, full = _models(bundle, name)
        checks.append(_derivation_check(bundle, name, found, full))
        checks += layer_checks(bundle, name, references, (found, full))
    unrecorded = [name for name in low if bundle.graph(name).high_precision_nodes is None]
    if not unrecorded:
        return checks, []
    return checks, [
        f"The bundle does not record which products of {', '.join(unrecorded)} stay in a higher precision; that was "
        "read from the graphs themselves. Build them again to have it recorded."
    ]


def layer_checks(
    bundle: Bundle, name: str, references: Sequence[Reference], models: tuple[ModelProto, ModelProto] | None = None
) -> list[Check]:
    """The worst layer of a low-precision graph against FP32's layer of the same inputs, on the last reference.

    `models` are the graph and its FP32 source, where they are loaded already.
    """
    from cclip_deploy.parity.layers import layer_errors, layer_limit

    entry, graph = bundle.graph(name), name.split(".")[0]
    found, full = models or _models(bundle, name)
    one_picture = replace(references[-1], image=references[-1].image[:1])
    errors = layer_errors(found, full, entry.precision, one_picture.inputs_of(graph))
    if not errors:
        return []
    limit = layer_limit(entry.precision)
    worst = max(errors, key=lambda layer: np.inf if np.isnan(layer.error) else layer.error)
    wrong = [layer for layer in errors if not layer.error <= limit]
    told = ", ".join(f"node {layer.node!r} ({layer.op_type}): {layer.error:.3g}" for layer in wrong[:LAYERS_SHOWN])
    return [
        Check(
            f"{graph}/layers", graph, BACKEND, entry.precision, "layer_error", worst.error, limit, not wrong,
            f"{len(wrong)} of {len(errors)} layers: {told}" if wrong else None,
        )
    ]  # fmt: skip


def _models(bundle: Bundle, name: str) -> tuple[ModelProto, ModelProto]:
    """A low-precision graph and the FP32 graph that it is made from."""
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
        faults = [f"FP32 and the recorded ranges give no {entry.precision} graph: {error}"]
    detail = f"{faults[0]}; that is not what FP32 and the recorded ranges give" if faults else None
    return Check(
        f"{graph}/derivation", graph, BACKEND, entry.precision, "differences", len(faults), 0.0, not faults, detail
    )


def _io_of(entry: GraphEntry) -> InputsAndOutputs:
    return "fp16" if any(tensor.dtype == "float16" for tensor in (*entry.inputs, *entry.outputs)) else "fp32"
