"""ONNX Runtime sessions: execution providers, how to install them, and session creation without a fallback."""

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
    """The bytes of an ONNX graph, and its file for messages."""

    content: bytes = field(repr=False)
    path: Path


def load_onnxruntime(device: Device) -> Any:
    """Import onnxruntime; raise EnvironmentIssue if it is missing or lacks the device's execution provider."""
    if device not in PROVIDERS:
        raise UsageError(f"There is no device {device!r}. Use one of {', '.join(PROVIDERS)}.")
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
    """Create a session that runs on `device`, without a fallback to the CPU.

    Two graph optimizations of ONNX Runtime 1.32 change results and are disabled for the affected precisions: it takes
    the zero point 0 of FP8 for the smallest value of the type and removes the ReLU before it, and it quantizes biases
    with a scale that underflows in float16.

    Args:
        runtime: the onnxruntime module.
        model: the graph.
        device: key of `PROVIDERS`.
        threads: CPU threads; None is ONNX Runtime's default.
        precision: of the graph.
        providers: execution providers with options, in order; by default the one of the device.

    Raises:
        EnvironmentIssue: the device cannot be used.
        BundleError: the graph cannot be loaded.
    """
    options = runtime.SessionOptions()
    disabled = []
    kind = Precision(precision)
    if kind.product_type == "fp8":
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if kind.is_quantized and kind != Precision.INT8:
        disabled.append("WeightBiasQuantization")
    options.log_severity_level = 3
    # Otherwise idle threads spin for tens of milliseconds after a run and slow down what runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    check_threads(threads)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    wanted = list(providers) or [(PROVIDERS[device], {})]
    plugged = _plugin_devices(runtime, device)
    content, what = (model.content, str(model.path)) if isinstance(model, NamedGraph) else (model, "a graph")
    try:
        if plugged:
            options.add_provider_for_devices(plugged, wanted[0][1])
        # With enable_fallback=0, a provider that fails raises instead of falling back to the CPU.
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
                "Run cclip-deploy doctor, or use --device cpu."
            ) from error
        raise BundleError(f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0][:200]}") from error
    session._model_bytes = None  # only needed for the fallback, and as large as the weights
    if PROVIDERS[device] not in session.get_providers():
        raise EnvironmentIssue(
            f"ONNX Runtime fell back from {device} to {session.get_providers()}: no usable GPU, driver or CUDA "
            "library. Run cclip-deploy doctor, or use --device cpu."
        )
    return session


def _plugin_devices(runtime: Any, device: Device) -> list[Any]:
    """Return the devices of the TensorRT-RTX provider, if it was registered as a library and not compiled in."""
    if device != "tensorrt-rtx" or PROVIDERS[device] in runtime.get_available_providers():
        return []
    found = [d for d in runtime.get_ep_devices() if d.ep_name == PROVIDERS[device]]
    if not found:
        raise EnvironmentIssue("ONNX Runtime's TensorRT-RTX provider finds no GPU. Run cclip-deploy doctor.")
    return found


def register_rtx_plugin(runtime: Any) -> None:
    """Register the TensorRT-RTX execution provider, which is a separate package, with ONNX Runtime."""
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
            f"ONNX Runtime's TensorRT-RTX provider cannot be loaded: {str(error).splitlines()[0][:200]}. It needs an "
            "NVIDIA driver and GPU: run cclip-deploy doctor."
        ) from error
