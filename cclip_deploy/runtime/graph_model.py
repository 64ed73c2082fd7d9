"""Load a bundle's graph as an ONNX model, and run ONNX models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.graph.parse import parse_graph
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session

if TYPE_CHECKING:
    from onnx import ModelProto


def load_model(bundle: Bundle, key: str) -> ModelProto:
    """Load a graph by its key in the manifest, such as `fused.fp16`, after checking it. Needs onnx.

    Raises:
        UsageError: there is no such graph.
        BundleError: the file is missing or altered, or does not have the form of exported graphs.
    """
    entry = bundle.graph(key)
    return parse_graph(read_checked(bundle, entry), bundle.path / entry.file)


def run_on_cpu(
    model: ModelProto, outputs: Sequence[str], precision: str, inputs: Mapping[str, NDArray[np.generic]]
) -> list[Any]:
    """Return outputs of an ONNX model, computed by ONNX Runtime on the CPU; inputs that it lacks are ignored."""
    session = make_session(load_onnxruntime("cpu"), model.SerializeToString(), "cpu", None, precision)
    types = {tensor.name: tensor.type for tensor in session.get_inputs()}
    feeds = {
        name: value.astype(np.float16) if types[name] == "tensor(float16)" else value
        for name, value in inputs.items()
        if name in types
    }
    found: list[Any] = session.run(list(outputs), feeds)
    return found
