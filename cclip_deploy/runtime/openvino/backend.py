"""OpenVINO backend on a CPU: runs the bundle's ONNX graphs, never in a lower precision than the graph's."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry, TensorSpec
from cclip_deploy.common.threads import check_threads
from cclip_deploy.errors import BundleError, EnvironmentIssue, PrecisionNotSupported
from cclip_deploy.runtime.backend import Arrays, check_answer, check_tensors, run_failure
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.openvino.arithmetic import Arithmetic, arithmetic_of, hint_for, refuse_lower
from cclip_deploy.runtime.openvino.unsigned import use_all_bits
from cclip_deploy.runtime.watchdog import check_seconds_limit, time_limit

DEVICE, IMAGE = "CPU", "image"
INSTALL = "pip install 'cclip-deploy[openvino]'"
NOT_RUN = {"int8-fp16": "OpenVINO does not compile convolutions whose INT8 codes are dequantized to FP16"}
"""Precisions that OpenVINO (2026.4) cannot run, with the reason."""
REQUESTS_KEPT = 2
"""Inference requests per graph: the decoder's last request holds its features, so the next image needs another."""

_Finished = tuple[Any, list["weakref.ref[NDArray[np.float32]]"]]


class OpenVinoBackend:
    """Runs a bundle's graphs of one precision in OpenVINO; a graph is compiled on first use.

    Graphs with image inputs are compiled for batch size 1, and with a dynamic batch when a larger batch is first run:
    a dynamic batch makes OpenVINO convert large tensors between layouts. INT8 tensors that are never negative use all
    eight bits (see `unsigned`).
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "fp32",
        threads: int | None = None,
        seconds_limit: float | None = None,
    ) -> None:
        """Create the backend without compiling graphs.

        Args:
            bundle: contains the graphs.
            precision: of the graphs.
            threads: CPU threads; None is OpenVINO's default.
            seconds_limit: a run that takes longer is stopped between two operators and raises EnvironmentIssue.

        Raises:
            PrecisionNotSupported: OpenVINO cannot run graphs of this precision.
            EnvironmentIssue: OpenVINO is not installed. Also raised when a graph is loaded that this processor would
                run in a lower precision.
        """
        check_threads(threads)
        check_seconds_limit(seconds_limit)
        if precision in NOT_RUN:
            raise PrecisionNotSupported(
                f"{NOT_RUN[precision]}, so it cannot run {precision} graphs. Use --backend onnxruntime, or another "
                f"precision of the bundle: {', '.join(p for p in bundle.precisions() if p not in NOT_RUN)}."
            )
        self.bundle = bundle
        self.precision = precision
        self.threads = threads
        self.seconds_limit = seconds_limit
        self._core = load_openvino().Core()
        self._compiled: dict[tuple[str, bool], CompiledGraph] = {}
        self._compiling = RLock()
        self.read_back: dict[str, Arithmetic] = {}

    def load(self, graph: str) -> None:
        self._graph(graph, _takes_images(self._entry(graph)))

    def unload(self, graph: str) -> None:
        for is_single in (False, True):
            self._compiled.pop((graph, is_single), None)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        entry = self._entry(graph)
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        is_single = _takes_images(entry) and len(arrays[IMAGE]) == 1
        answer = self._graph(graph, is_single).infer(arrays, [output.name for output in entry.outputs])
        check_answer(self.bundle.path / entry.file, entry, arrays, answer)
        return answer

    @property
    def arithmetic(self) -> dict[str, str]:
        """Lowest type of the products in each loaded graph: 'fp32', 'bf16', …; not lower than the graph's precision."""
        return {graph: ran.lowest for graph, ran in self.read_back.items()}

    def _entry(self, graph: str) -> GraphEntry:
        return self.bundle.graph_in(graph, self.precision)

    def _graph(self, graph: str, is_single: bool) -> CompiledGraph:
        with self._compiling:
            if (graph, is_single) not in self._compiled:
                self._compiled[graph, is_single] = self._compile(graph, is_single)
            return self._compiled[graph, is_single]

    def _compile(self, graph: str, is_single: bool) -> CompiledGraph:
        entry = self._entry(graph)
        path = self.bundle.path / entry.file
        model = read_graph(self._core, read_checked(self.bundle, entry), path)
        inputs, outputs = ({t.name for t in tensors} for tensors in (entry.inputs, entry.outputs))
        check_tensors(path, entry, _specs(model.inputs, inputs), _specs(model.outputs, outputs))
        if is_single:
            model.reshape({t.name: [1 if isinstance(side, str) else side for side in t.shape] for t in entry.inputs})
        if entry.precision.product_type == "int8":
            use_all_bits(model)
        compiled = compile_graph(self._core, model, entry.precision, self.threads)
        self.read_back[graph] = arithmetic_of(compiled)
        refuse_lower(entry.file, entry.precision, self.read_back[graph])
        return CompiledGraph(compiled, path, self.seconds_limit)


class CompiledGraph:
    """A compiled graph and its inference requests, in whose memory the outputs are.

    A request is used again when no array refers to its outputs any more. So outputs are neither copied nor overwritten,
    and no new memory is allocated for every image, which would take as long as many convolutions.
    """

    def __init__(self, compiled: Any, path: Path, seconds_limit: float | None = None) -> None:
        self.compiled = compiled
        self.path = path
        self.seconds_limit = seconds_limit
        self._finished: deque[_Finished] = deque(maxlen=REQUESTS_KEPT)
        self._lock = Lock()

    def infer(self, inputs: Mapping[str, NDArray[np.generic]], names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Run the graph and return the named outputs.

        Raises:
            EnvironmentIssue: memory ran out, or the time limit was exceeded.
            BundleError: an operator failed, or the inputs are not the graph's.
        """
        request = self._free_request()
        try:
            if self.seconds_limit is None:
                answers = request.infer(inputs, share_inputs=True, share_outputs=True)
                named = {name: answers[self.compiled.output(name)] for name in names}
            else:
                with time_limit(self.seconds_limit, request.cancel, str(self.path)):
                    request.start_async(inputs, share_inputs=True)
                    request.wait()
                named = {name: request.get_tensor(self.compiled.output(name)).data for name in names}
        except (RuntimeError, MemoryError) as error:
            raise run_failure("OpenVINO", self.path, error) from error
        with self._lock:
            self._finished.append((request, [weakref.ref(array) for array in named.values()]))
        return named

    def _free_request(self) -> Any:
        with self._lock:
            for place, (request, answers) in enumerate(self._finished):
                if all(answer() is None for answer in answers):
                    del self._finished[place]
                    return request
        return self.compiled.create_infer_request()


def _takes_images(entry: GraphEntry) -> bool:
    """Return whether a graph has an image input with a dynamic batch; the batch of a plain export is static."""
    return any(tensor.name == IMAGE and isinstance(tensor.shape[0], str) for tensor in entry.inputs)


def load_openvino() -> Any:
    """Import openvino with its telemetry disabled; raise EnvironmentIssue if it is missing.

    `import openvino` and every conversion are reported to Google Analytics by the package openvino-telemetry. If that
    package is missing, openvino uses a stub that does nothing, so the package is hidden in this process. If openvino
    was imported before, this has no effect; reading and running ONNX graphs reports nothing.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentIssue(f"openvino cannot be imported ({error}). Install it: {INSTALL}") from error
    return openvino


def describe_device() -> list[str]:
    """Return OpenVINO's name of the processor, followed by the types that it supports: 'FP32', 'INT8', …"""
    core = load_openvino().Core()
    if DEVICE not in core.available_devices:
        return []
    listed = sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
    kinds = [kind for kind in listed if kind.startswith(("FP", "BF", "INT"))]
    return [str(core.get_property(DEVICE, "FULL_DEVICE_NAME")), *kinds]


def read_graph(core: Any, content: bytes, path: Path) -> Any:
    """Read an ONNX file into an OpenVINO model, with `expand_channel_constants` applied.

    Raises:
        BundleError: OpenVINO cannot read it; the message names `path`.
    """
    try:
        model = core.read_model(content)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot read {path}: {_reason(error)}. Export the bundle again.") from error
    expand_channel_constants(model)
    return model


def compile_graph(core: Any, model: Any, precision: str = "fp32", threads: int | None = None) -> Any:
    """Compile a model for the CPU: one request at a time, without hyper-threading, with a fixed inference precision."""
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_PRECISION_HINT": hint_for(precision, core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")),
        "ENABLE_HYPER_THREADING": False,
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        return core.compile_model(model, DEVICE, settings)
    except RuntimeError as error:
        raise EnvironmentIssue(
            f"OpenVINO cannot compile a graph for this processor: {_reason(error)}. Use --backend onnxruntime."
        ) from error


def expand_channel_constants(model: Any) -> None:
    """Expand per-channel constants that are combined with a matrix product to the product's last dimension.

    With a dynamic batch, OpenVINO 2026.4 fuses the sum of a product (B, C, H, W) and a constant (1, C, 1, 1) as if the
    constant were along W: compilation fails or, if C equals W, the result is wrong. A constant (1, C, 1, W) is not
    fused.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Add", "Subtract", "Multiply", "Divide"):
            continue
        for place, other in ((0, 1), (1, 0)):
            constant, product = (node.input_value(index).get_node() for index in (place, other))
            if constant.get_type_name() != "Constant" or product.get_type_name() != "MatMul":
                continue
            shape, last = list(constant.get_output_shape(0)), product.get_output_partial_shape(0)[-1]
            if len(shape) > 1 and shape[-1] == 1 and max(shape) > 1 and last.is_static:
                wide = opset13.constant(np.repeat(constant.get_data(), last.get_length(), axis=-1))
                node.input(place).replace_source_output(wide.output(0))


def _specs(ports: Iterable[Any], listed: set[str]) -> list[TensorSpec]:
    """Convert OpenVINO's inputs or outputs to the manifest's form; a tensor can have several names."""
    specs = []
    for port in ports:
        names = port.get_names()
        shape = tuple(side.get_length() if side.is_static else "?" for side in port.get_partial_shape())
        name = min(names & listed or names)
        specs.append(TensorSpec(name=name, dtype=port.get_element_type().to_dtype().name, shape=shape))
    return specs


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    return " ".join(lines)[:300] or "no reason given"
