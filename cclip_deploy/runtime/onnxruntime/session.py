"""Create ONNX Runtime sessions on a device, and install hints for its execution providers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.threads import check_threads
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
INSTALL = {
    "cpu": "pip install 'cclip-deploy[cpu]'",
    "cuda": "pip install 'cclip-deploy[gpu]'",
    "tensorrt": "pip install 'cclip-deploy[gpu,tensorrt]'",
    "tensorrt-rtx": "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
}
Device = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
Provider = tuple[str, dict[str, str]]
_BAD_GRAPH = ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel", "InvalidArgument")
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL_PLUGIN = "pip install onnxruntime-ep-nv-tensorrt-rtx"


@dataclass(frozen=True)
class NamedGraph:
    """The bytes of an ONNX graph, and the file that messages name."""

    content: bytes = field(repr=False)
    path: Path


def load_onnxruntime(device: Device) -> Any:
    """The onnxruntime module; EnvironmentIssue where it is missing or lacks the device's provider."""
    if device not in PROVIDERS:
        raise UsageError(f"Device {device!r} is none of {', '.join(PROVIDERS)}.")
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentIssue(f"onnxruntime cannot be imported ({error}). Install it: {INSTALL[device]}") from error
    have = onnxruntime.get_available_providers()
    if device == "tensorrt-rtx":
        register_rtx_plugin(onnxruntime)
    elif PROVIDERS[device] not in have:
        raise EnvironmentIssue(
            f"This onnxruntime has no {PROVIDERS[device]} (it has {', '.join(have)}). "
            f"Replace it: pip uninstall onnxruntime; {INSTALL[device]}"
        )
    return onnxruntime


def make_session(
    runtime: Any,
    model: NamedGraph | bytes,
    device: Device = "cpu",
    threads: int | None = None,
    precision: str = "fp32",
    providers: Sequence[Provider] = (),
) -> Any:
    """A session of a graph that really runs on `device`, with as many threads as given.

    `providers` are those that may run it, in order, instead of the device's own without options.

    Two of ONNX Runtime 1.32's rewrites change what a graph computes, so they are off where they would: it takes the
    zero point 0 of an FP8 pair for the least value of its type and drops the ReLU before it, and it quantizes biases
    with a scale that underflows where scales are float16.
    """
    options = runtime.SessionOptions()
    disabled = []
    kind = Precision(precision)
    if kind.product_type == "fp8":
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if kind.is_quantized and kind != Precision.INT8:
        disabled.append("WeightBiasQuantization")
    options.log_severity_level = 3
    # Idle threads would spin for tens of milliseconds after a run, at the expense of whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    check_threads(threads)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    wanted = list(providers) or [(PROVIDERS[device], {})]
    plugged = _plugged_devices(runtime, device)
    content, what = (model.content, str(model.path)) if isinstance(model, NamedGraph) else (model, "a graph")
    try:
        if plugged:
            options.add_provider_for_devices(plugged, wanted[0][1])
        # Without `enable_fallback`, a provider that fails is an error instead of a session on the CPU.
        session = runtime.InferenceSession(
            content,
            options,
            **({} if plugged else {"providers": wanted}),
            disabled_optimizers=disabled,
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions have no common public base
        if device != "cpu" and type(error).__name__ not in _BAD_GRAPH:
            raise EnvironmentIssue(
                f"ONNX Runtime cannot run {what} on {device}: {str(error).splitlines()[0][:200]}. "
                "Run cclip-deploy doctor, or ask for --device cpu."
            ) from error
        raise BundleError(f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0][:200]}") from error
    session._model_bytes = None  # kept for a fallback that is switched off, and as large as the weights
    if PROVIDERS[device] not in session.get_providers():
        raise EnvironmentIssue(
            f"ONNX Runtime was asked for {device} and fell back to {session.get_providers()}: no usable GPU, driver or "
            "CUDA library. Run cclip-deploy doctor, or ask for --device cpu."
        )
    return session


def _plugged_devices(runtime: Any, device: Device) -> list[Any]:
    """The devices of providers that were registered as libraries, as TensorRT-RTX is unless it was compiled in."""
    if device != "tensorrt-rtx" or PROVIDERS[device] in runtime.get_available_providers():
        return []
    found = [d for d in runtime.get_ep_devices() if d.ep_name == PROVIDERS[device]]
    if not found:
        raise EnvironmentIssue("ONNX Runtime's TensorRT-RTX provider finds no GPU. Run cclip-deploy doctor.")
    return found


def register_rtx_plugin(runtime: Any) -> None:
    """Make the TensorRT-RTX provider known to ONNX Runtime, which it comes to as a package of its own."""
    provider = PROVIDERS["tensorrt-rtx"]
    if provider in runtime.get_available_providers() or any(d.ep_name == provider for d in runtime.get_ep_devices()):
        return
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
    except ImportError as error:
        raise EnvironmentIssue(
            f"ONNX Runtime's TensorRT-RTX provider cannot be imported ({error}). Install it: {INSTALL_PLUGIN}"
        ) from error
    try:
        runtime.register_execution_provider_library(provider, plugin.get_library_path())
    except Exception as error:  # onnxruntime's exceptions have no common public base
        raise EnvironmentIssue(
            f"ONNX Runtime's TensorRT-RTX provider does not load: {str(error).splitlines()[0][:200]}. It needs an "
            "NVIDIA driver and GPU: run cclip-deploy doctor."
        ) from error
