"""OpenVINO on a CPU: the bundle's own ONNX graphs, in the precision that they are in and no lower one."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
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

DEVICE, PICTURE = "CPU", "image"
INSTALL = "pip install 'cclip-deploy[openvino]'"
NOT_RUN = {"int8-fp16": "OpenVINO does not compile convolutions whose INT8 codes are dequantized to FP16"}
"""Why OpenVINO (2026.4) cannot run the graphs of a precision; it runs those of every other one."""
REQUESTS_KEPT = 2
"""Of each graph: the decoder's last request holds the features that it read, so the next picture needs a second one."""

_Finished = tuple[Any, list["weakref.ref[NDArray[np.float32]]"]]


class OpenVinoBackend:
    """A bundle's graphs of one precision in OpenVINO; each is compiled when it is first asked for.

    A graph that takes pictures is compiled for one picture alone, and with any number of them only when more come at
    once: with a dynamic batch, OpenVINO moves large tensors between layouts that it leaves in place where it knows the
    size. Who runs both holds both in memory. In INT8, tensors that are never negative get all eight bits.
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
        """Nothing is compiled yet.

        A run that takes longer than `seconds_limit` is stopped, between two operators, and is an EnvironmentIssue.

        Raises:
            PrecisionNotSupported: OpenVINO cannot run graphs of this precision.
            EnvironmentIssue: OpenVINO is not installed. Loading a graph raises it where this processor would run the
                graph's products in a lower precision than its own.
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
        self.read_back: dict[str, Arithmetic] = {}

    def load(self, graph: str) -> None:
        self._graph(graph, _takes_pictures(self._entry(graph)))

    def unload(self, graph: str) -> None:
        for one_alone in (False, True):
            self._compiled.pop((graph, one_alone), None)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        entry = self._entry(graph)
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        one_alone = _takes_pictures(entry) and len(arrays[PICTURE]) == 1
        answer = self._graph(graph, one_alone).infer(arrays, [output.name for output in entry.outputs])
        check_answer(self.bundle.path / entry.file, entry, arrays, answer)
        return answer

    @property
    def arithmetic(self) -> dict[str, str]:
        """What the products of each graph that was loaded run in: 'fp32', 'bf16', …; wider than the graph, or as it."""
        return {graph: ran.lowest for graph, ran in self.read_back.items()}

    def _entry(self, graph: str) -> GraphEntry:
        return self.bundle.graph_in(graph, self.precision)

    def _graph(self, graph: str, one_alone: bool) -> CompiledGraph:
        if (graph, one_alone) not in self._compiled:
            entry = self._entry(graph)
            path = self.bundle.path / entry.file
            model = read_graph(self._core, read_checked(self.bundle, entry), path)
            inputs, outputs = ({t.name for t in told} for told in (entry.inputs, entry.outputs))
            check_tensors(path, entry, _specs(model.inputs, inputs), _specs(model.outputs, outputs))
            if one_alone:
                model.reshape(
                    {t.name: [1 if isinstance(side, str) else side for side in t.shape] for t in entry.inputs}
                )
            if entry.precision.product_type == "int8":
                use_all_bits(model)
            compiled = compile_graph(self._core, model, entry.precision, self.threads)
            self.read_back[graph] = arithmetic_of(compiled)
            refuse_lower(entry.file, entry.precision, self.read_back[graph])
            self._compiled[graph, one_alone] = CompiledGraph(compiled, path, self.seconds_limit)
        return self._compiled[graph, one_alone]


class CompiledGraph:
    """A compiled graph and its requests, whose answers lie in the requests' own memory.

    A request runs again only when nobody holds what it answered: nothing is copied and no answer is overwritten, and
    yet an image pass does not have to get fresh pages for its features from the system, which costs as much as many
    convolutions.
    """

    def __init__(self, compiled: Any, path: Path, seconds_limit: float | None = None) -> None:
        self.compiled = compiled
        self.path = path
        self.seconds_limit = seconds_limit
        self._finished: deque[_Finished] = deque(maxlen=REQUESTS_KEPT)
        self._lock = Lock()

    def infer(self, inputs: Mapping[str, NDArray[np.generic]], names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """The outputs of these names.

        Raises:
            EnvironmentIssue: memory ran out or the time limit passed.
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


def _takes_pictures(entry: GraphEntry) -> bool:
    """Whether a graph has pictures of which it takes any number; a plain export's batch is fixed."""
    return any(tensor.name == PICTURE and isinstance(tensor.shape[0], str) for tensor in entry.inputs)


def load_openvino() -> Any:
    """The openvino module, kept from sending anything; EnvironmentIssue where it is missing.

    A bare `import openvino` reports its version, and each conversion, to Google Analytics through the package
    openvino-telemetry unless somebody opted out before. Where that package is not there, openvino's own stand-in does
    nothing; so it is made to be absent for this process. An application that imported openvino before us has made
    that choice itself; reading and running ONNX graphs, all that we do afterwards, reports nothing.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentIssue(f"openvino cannot be imported ({error}). Install it: {INSTALL}") from error
    return openvino


def describe_device() -> list[str]:
    """OpenVINO's name for the processor, and then the kinds of arithmetic that it has for it: 'FP32', 'INT8', …"""
    core = load_openvino().Core()
    if DEVICE not in core.available_devices:
        return []
    listed = sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
    kinds = [kind for kind in listed if kind.startswith(("FP", "BF", "INT"))]
    return [str(core.get_property(DEVICE, "FULL_DEVICE_NAME")), *kinds]


def read_graph(core: Any, content: bytes, path: Path) -> Any:
    """The bytes of an ONNX file as OpenVINO's model, safe to compile; the model keeps a copy of what it needs.

    Raises:
        BundleError: OpenVINO does not read them; the message names `path`.
    """
    try:
        model = core.read_model(content)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot read {path}: {_reason(error)}. Export the bundle again.") from error
    spread_channel_constants(model)
    return model


def compile_graph(core: Any, model: Any, precision: str = "fp32", threads: int | None = None) -> Any:
    """A model ready to run on the CPU: one request at a time, on real cores, the arithmetic named."""
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


def spread_channel_constants(model: Any) -> None:
    """Give every per-channel constant that meets a matrix product the product's last side.

    With a dynamic batch, OpenVINO 2026.4 fuses the sum of a product (B, C, H, W) and a constant (1, C, 1, 1) into the
    product as if the constant lay along W: it refuses to compile, or, where C equals W, computes something else. A
    constant (1, C, 1, W) is not fused, and the sum is the same.
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


def _specs(ports: Iterable[Any], told: set[str]) -> list[TensorSpec]:
    """OpenVINO's inputs or outputs in the manifest's words; a tensor has several names where graphs were joined."""
    specs = []
    for port in ports:
        names = port.get_names()
        shape = tuple(side.get_length() if side.is_static else "?" for side in port.get_partial_shape())
        name = min(names & told or names)
        specs.append(TensorSpec(name=name, dtype=port.get_element_type().to_dtype().name, shape=shape))
    return specs


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    return " ".join(lines)[:300] or "no reason given"
