"""Deploy CausalCLIPSeg: from a checkpoint to verified ONNX Runtime, OpenVINO and TensorRT engines.

    from cclip_deploy import Bundle, Segmenter

The names of the public API are imported when they are first used.
"""

import os
from typing import TYPE_CHECKING

# ONNX Runtime 1.32 stores a device id and events on disk and uploads them unless this is set before its import.
# Disabling its events later does not stop it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.inference.segmenter import Segmenter

__version__ = "0.1.0"
__all__ = ["Bundle", "Segmenter", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name == "Bundle":
        from cclip_deploy.bundle.bundle import Bundle

        return Bundle
    if name == "Segmenter":
        from cclip_deploy.inference.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
