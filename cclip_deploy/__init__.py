"""Deploy CausalCLIPSeg: from a checkpoint to verified ONNX Runtime, OpenVINO and TensorRT engines."""

import os

# ONNX Runtime 1.32 keeps a device id and events on disk and sends them, unless this is set before its import. Switching
# its events off afterwards does not stop it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
