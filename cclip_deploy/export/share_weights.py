"""Store the weights of a graph once that other graphs of its bundle have too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cclip_deploy.bundle.checksums import hash_bytes
from cclip_deploy.runtime.onnx_wire import read_model
from cclip_deploy.runtime.shared_weights import PIN

SMALLEST = 1024
"""Smaller weights, in bytes, stay in the graph."""


def share_weights(path: Path, others: Sequence[Path]) -> None:
    """Replace the weights in an ONNX file that other files have too by external data, which names their place there.

    Any ONNX tool opens the file as long as the others are in the same folder. `runtime.shared_weights` reads it from
    verified bytes.

    Args:
        path: an ONNX file with all its weights.
        others: ONNX files in the same folder, with all their weights.
    """
    import onnx

    model = onnx.load(path)
    tensors = {(t.data_type, tuple(t.dims), hash_bytes(t.raw_data)): t for t in model.graph.initializer}
    for other in others:
        content, used = other.read_bytes(), False
        start = _address(content)
        for found in read_model(content).initializers:
            tensor = tensors.get((found.data_type, found.dims, hash_bytes(found.data)))
            if tensor is not None and len(found.data) >= SMALLEST and tensor.data_location != onnx.TensorProto.EXTERNAL:
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                place = {"location": other.name, "offset": _address(found.data) - start, "length": len(found.data)}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                used = True
        if used:
            model.metadata_props.add(key=f"{PIN}{other.name}", value=hash_bytes(content))
    path.write_bytes(model.SerializeToString())


def _address(content: bytes | memoryview) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)
