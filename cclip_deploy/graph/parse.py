"""Parse ONNX graphs whose bytes have been verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.errors import BundleError

if TYPE_CHECKING:
    from onnx import ModelProto


def parse_graph(content: bytes, path: Path) -> ModelProto:
    """Parse the bytes of an ONNX file; raise BundleError, which names `path`, if they are not a graph."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise BundleError(f"{path} is not an ONNX graph ({error}). Export the bundle again.") from error
