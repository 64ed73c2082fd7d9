"""Load a bundle's graph as an ONNX model, after checking its checksum and structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.graph.parse import parse_graph
from cclip_deploy.runtime.graph_check import read_checked

if TYPE_CHECKING:
    from onnx import ModelProto


def load_model(bundle: Bundle, key: str) -> ModelProto:
    """Load a graph by its key in the manifest: `fused`, `fused.fp16`. Needs onnx.

    Raises:
        UsageError: there is no such graph.
        BundleError: the file is missing or altered, or does not have the form of exported graphs.
    """
    entry = bundle.graph(key)
    return parse_graph(read_checked(bundle, entry), bundle.path / entry.file)
