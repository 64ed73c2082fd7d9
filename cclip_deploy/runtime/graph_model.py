"""A bundle's graph as an ONNX model, from bytes whose checksum and structure were checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.graph.parse import parse_graph
from cclip_deploy.runtime.graph_check import read_checked

if TYPE_CHECKING:
    from onnx import ModelProto


def load_model(bundle: Bundle, key: str) -> ModelProto:
    """The model of a graph by its name in the manifest: `fused`, `fused.fp16`; needs onnx.

    Raises:
        UsageError: there is no such graph.
        BundleError: the file is missing or altered, or is no graph that exports make.
    """
    entry = bundle.graph(key)
    return parse_graph(read_checked(bundle, entry), bundle.path / entry.file)
