"""ONNX Runtime on a CPU; and what it shares with its GPU providers: a session that runs where it was asked to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry, TensorSpec
from cclip_deploy.bundle.precision import is_quantized
from cclip_deploy.common.threads import check_threads
from cclip_deploy.errors import BundleError, CclipError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import Arrays, check_answer, check_tensors, run_failure
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.watchdog import check_seconds_limit, time_limit

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
_BAD_INPUT = ("InvalidArgument", "ValueError")
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


@dataclass(frozen=True)
class NamedGraph:
    """The bytes of an ONNX graph, and the file that messages name."""

    content: bytes = field(repr=False)
    path: Path


class OnnxRuntimeBackend:
    """A bundle's graphs of one precision in ONNX Runtime; sessions are made when a graph is first asked for.

    On a CPU, ONNX Runtime leaves out the roundings between FP16 operators. With `rounds_as_written` they are all made,
    as a GPU makes them, which needs onnx and time: for parity, not for speed. BF16 runs in no other way.

    A run that takes longer than `seconds_limit` is stopped, between two operators, and is an EnvironmentIssue.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "fp32",
        device: Device = "cpu",
        threads: int | None = None,
        rounds_as_written: bool = False,
        seconds_limit: float | None = None,
    ) -> None:
        check_seconds_limit(seconds_limit)
        self.bundle = bundle
        self.precision = precision
        self.device = device
        self.threads = threads
        self.rounds_as_written = rounds_as_written
        self.seconds_limit = seconds_limit
        self._runtime = load_onnxruntime(device)
        self._sessions: dict[str, Any] = {}

    def load(self, graph: str) -> None:
        self._session(graph)

    def unload(self, graph: str) -> None:
        self._sessions.pop(graph, None)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        session = self._session(graph)
        names = [output.name for output in session.get_outputs()]
        halves = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
        given = {name: _as_taken(value, name in halves) for name, value in inputs.items()}
        with self._guarded(graph) as options:
            values = session.run(names, given, options)
        answer = {name: value.astype(np.float32, copy=False) for name, value in zip(names, values, strict=True)}
        entry = self.bundle.graph_in(graph, self.precision)
        check_answer(self.bundle.path / entry.file, entry, inputs, answer)
        return answer

    @contextmanager
    def _guarded(self, graph: str) -> Iterator[Any]:
        """Options for one run; whatever the run raises becomes an error that names the graph.

        Raises:
            UsageError: the inputs are not those of the graph.
            EnvironmentIssue: memory ran out, the device failed or `seconds_limit` passed.
            BundleError: an operator failed.
        """
        path = self.bundle.path / self.bundle.graph_in(graph, self.precision).file
        options = self._runtime.RunOptions()
        options.log_severity_level = 4  # failures are raised, so they need not be logged too
        try:
            with time_limit(self.seconds_limit, lambda: setattr(options, "terminate", True), str(path)):
                yield options
        except CclipError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common public base
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if not isinstance(error, MemoryError) and "while running" not in str(error):
                if self.device != "cpu" and type(error).__name__ not in _BAD_INPUT:
                    raise EnvironmentIssue(
                        f"ONNX Runtime cannot run {path} on {self.device}: {reason}. Run cclip-deploy doctor, or use "
                        "--device cpu."
                    ) from error
                raise UsageError(f"These inputs do not fit {path}: {reason}") from error
            raise run_failure("ONNX Runtime", path, error) from error

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            entry = self.bundle.graph_in(graph, self.precision)
            path, content = self.bundle.path / entry.file, read_checked(self.bundle, entry)
            has_16_bit_types = self.rounds_as_written and entry.precision.endswith("fp16")
            widens = self.device == "cpu" and (has_16_bit_types or entry.precision == "bf16")
            model = NamedGraph(_with_emulated_rounding(content, path) if widens else content, path)
            del content  # as large as the weights
            providers = self._providers(entry)
            session = make_session(self._runtime, model, self.device, self.threads, entry.precision, providers)
            try:
                inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
            except UnicodeDecodeError as error:
                raise BundleError(f"{path} has names that are not UTF-8. Export the bundle again.") from error
            check_tensors(path, entry, inputs, outputs)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _providers(self, entry: GraphEntry) -> list[Provider]:
        """The providers that may run a graph, in order, with their options."""
        return [(PROVIDERS[self.device], {})]


def _specs(tensors: Iterable[Any]) -> list[TensorSpec]:
    """ONNX Runtime's arguments in the manifest's words; a dynamic side is named or None there."""
    return [
        TensorSpec(
            name=tensor.name,
            dtype=_TYPES.get(tensor.type, tensor.type),
            shape=tuple(side if isinstance(side, int) else str(side) for side in tensor.shape),
        )
        for tensor in tensors
    ]


def _as_taken(value: NDArray[np.generic], half: bool) -> NDArray[np.generic]:
    """An input as a graph takes it, whose inputs may be float16 on request."""
    return np.ascontiguousarray(value, np.float16 if half else None)


def _with_emulated_rounding(content: bytes, path: Path) -> bytes:
    """A graph of 16 bits as FP32 arithmetic with the same roundings."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise EnvironmentIssue(
            f"Rounding as BF16 or FP16 does on a CPU needs onnx ({error}). Install: pip install 'cclip-deploy[export]'"
        ) from error
    from cclip_deploy.graph.parse import parse_graph
    from cclip_deploy.graph.precision.rounding import emulate_rounding

    return bytes(emulate_rounding(parse_graph(content, path)).SerializeToString())


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
        from cclip_deploy.runtime.onnxruntime.gpu import register_rtx_plugin

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
    if precision.startswith("fp8"):
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if is_quantized(precision) and precision != "int8":
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
