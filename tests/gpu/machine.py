"""Availability of a GPU, ONNX Runtime providers and TensorRT bindings on this machine."""

from __future__ import annotations

import ctypes
import importlib.util

NOT_IN_RTX = ("9.0", "10.0", "10.3")


def gpu_reason() -> str | None:
    """Return why there is no usable GPU, or None if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "a driver, but no GPU"
    return None


def provider_reason(device: str) -> str | None:
    """Return why onnxruntime lacks the provider of a device, or None if it has it."""
    import onnxruntime

    from cclip_deploy.runtime.onnxruntime.session import INSTALL, PROVIDERS, RTX_PLUGIN

    if PROVIDERS[device] in onnxruntime.get_available_providers():
        return None
    if device == "tensorrt-rtx" and importlib.util.find_spec(RTX_PLUGIN):
        return None
    return f"this onnxruntime has no {PROVIDERS[device]}: {INSTALL[device]}"


def binding_reason(name: str, compute_capability: str) -> str | None:
    """Return why a binding's engines cannot be built or run, or None if they can."""
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if name == "tensorrt-rtx" and compute_capability in NOT_IN_RTX:
        return f"TensorRT-RTX has no target for compute capability {compute_capability}"
    return None
