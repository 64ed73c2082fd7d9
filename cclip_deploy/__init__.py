"""Deploy CausalCLIPSeg: from a checkpoint to verified ONNX Runtime, OpenVINO and TensorRT engines.

    from cclip_deploy import Segmenter

The names of the public API are imported when they are first used.
"""

import importlib
import os
from typing import TYPE_CHECKING

# ONNX Runtime 1.32 stores a device id and events on disk and uploads them unless this is set before its import.
# Disabling its events later does not stop it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.errors import CclipError, ImageError, PromptError
    from cclip_deploy.imaging.regions import Finding
    from cclip_deploy.imaging.segmentation import Segmentation
    from cclip_deploy.inference.segmenter import Segmenter
    from cclip_deploy.runtime.registry import BackendConfig

__version__ = "0.1.0"
__all__ = [
    "BackendConfig", "Bundle", "CclipError", "Finding", "ImageError", "PromptError", "Segmentation", "Segmenter",
    "__version__",
]  # fmt: skip
_MODULES = {
    "BackendConfig": "runtime.registry",
    "Bundle": "bundle.bundle",
    "CclipError": "errors",
    "Finding": "imaging.regions",
    "ImageError": "errors",
    "PromptError": "errors",
    "Segmentation": "imaging.segmentation",
    "Segmenter": "inference.segmenter",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
