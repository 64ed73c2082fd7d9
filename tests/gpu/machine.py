"""What there is on this machine to run engines with, or why not."""

from __future__ import annotations

import ctypes
import importlib.util

RTX_HAS_NONE = ("9.0", "10.0", "10.3")


def gpu_reason() -> str | None:
    """Why there is no usable GPU here; None where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "a driver, but no GPU"
    return None


def provider_reason(device: str) -> str | None:
    """Why this onnxruntime has no such provider; None where it has."""
    import onnxruntime

    from cclip_deploy.runtime.onnxruntime.session import INSTALL, PROVIDERS, RTX_PLUGIN

    if PROVIDERS[device] in onnxruntime.get_available_providers():
        return None
    if device == "tensorrt-rtx" and importlib.util.find_spec(RTX_PLUGIN):
        return None
    return f"this onnxruntime has no {PROVIDERS[device]}: {INSTALL[device]}"


def binding_reason(name: str, compute_capability: str) -> str | None:
    """Why engines of a binding cannot be built or run here; None where they can."""
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if name == "tensorrt-rtx" and compute_capability in RTX_HAS_NONE:
        return f"TensorRT-RTX has no target for compute capability {compute_capability}"
    return None
