"""A bundle's graph as an ONNX model, from the bytes that its checksum was verified on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cclip_deploy.bundle import Bundle
from cclip_deploy.graph.parse import parse_graph

if TYPE_CHECKING:
    from onnx import ModelProto


def load_model(bundle: Bundle, key: str) -> ModelProto:
    """The model of a graph by its name in the manifest: `fused`, `fused.fp16`; needs onnx.

    Raises:
        UsageError: there is no such graph.
        BundleError: the file is missing, altered or no ONNX graph.
    """
    file = bundle.graph(key).file
    return parse_graph(bundle.read(file), bundle.path / file)
