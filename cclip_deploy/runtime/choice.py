"""A backend by its name: the one place that knows them all."""

from __future__ import annotations

from typing import Literal, get_args

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import UsageError
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnx_runtime import Device, OnnxRuntimeBackend
from cclip_deploy.runtime.openvino import OpenVinoBackend

BackendName = Literal["onnxruntime", "openvino"]


def open_backend(
    name: BackendName,
    bundle: Bundle,
    precision: str = "fp32",
    device: Device = "cpu",
    threads: int | None = None,
    rounds_as_written: bool = False,
) -> Backend:
    """The backend that was asked for and no other; `rounds_as_written` is ONNX Runtime's.

    Raises:
        UsageError: there is no such backend, or not on this device.
        EnvironmentProblem: it is not installed, or cannot use the device.
    """
    if name == "onnxruntime":
        return OnnxRuntimeBackend(bundle, precision, device, threads, rounds_as_written)
    if name != "openvino":
        raise UsageError(f"Backend {name!r} is none of {', '.join(get_args(BackendName))}.")
    if device != "cpu":
        raise UsageError(f"OpenVINO runs on the CPU, not on {device}. Use --device cpu, or --backend onnxruntime.")
    return OpenVinoBackend(bundle, precision, threads)
