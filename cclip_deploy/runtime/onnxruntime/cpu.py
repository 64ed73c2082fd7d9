"""ONNX Runtime backend on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry, TensorSpec
from cclip_deploy.errors import BundleError, CclipError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import Arrays, check_answer, check_tensors, run_failure
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.onnxruntime.session import (
    PROVIDERS,
    Device,
    NamedGraph,
    Provider,
    load_onnxruntime,
    make_session,
)
from cclip_deploy.runtime.watchdog import check_seconds_limit, time_limit

_BAD_INPUT = ("InvalidArgument", "ValueError")
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


class OnnxRuntimeBackend:
    """Runs a bundle's graphs of one precision in ONNX Runtime; sessions are created on first use.

    Attributes:
        rounds_as_written: on a CPU, ONNX Runtime skips the rounding between FP16 operators. This option emulates it as
            on a GPU, for parity checks; it is slow and needs the package onnx. BF16 graphs always run like that.
        seconds_limit: a run that takes longer is stopped between two operators and raises EnvironmentIssue.
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
        self._loading = threading.RLock()

    def load(self, graph: str) -> None:
        self._session(graph)

    def unload(self, graph: str) -> None:
        self._sessions.pop(graph, None)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        session = self._session(graph)
        names = [output.name for output in session.get_outputs()]
        halves = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
        given = {name: _cast_input(value, name in halves) for name, value in inputs.items()}
        with self._guarded(graph) as options:
            values = session.run(names, given, options)
        answer = {name: value.astype(np.float32, copy=False) for name, value in zip(names, values, strict=True)}
        entry = self.bundle.graph_in(graph, self.precision)
        check_answer(self.bundle.path / entry.file, entry, inputs, answer)
        return answer

    @contextmanager
    def _guarded(self, graph: str) -> Iterator[Any]:
        """Yield the options for one run, and convert its exceptions into errors that name the graph.

        Raises:
            UsageError: the inputs are not those of the graph.
            EnvironmentIssue: memory ran out, the device failed, or `seconds_limit` was exceeded.
            BundleError: an operator failed.
        """
        path = self.bundle.path / self.bundle.graph_in(graph, self.precision).file
        options = self._runtime.RunOptions()
        options.log_severity_level = 4  # failures are raised, not logged
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
                raise UsageError(f"These inputs do not match {path}: {reason}") from error
            raise run_failure("ONNX Runtime", path, error) from error

    def _session(self, graph: str) -> Any:
        with self._loading:
            if graph not in self._sessions:
                self._sessions[graph] = self._new_session(graph)
            return self._sessions[graph]

    def _new_session(self, graph: str) -> Any:
        entry = self.bundle.graph_in(graph, self.precision)
        path, content = self.bundle.path / entry.file, read_checked(self.bundle, entry)
        is_emulated = self.rounds_as_written and entry.precision.rest == "fp16"
        is_emulated = self.device == "cpu" and (is_emulated or entry.precision == "bf16")
        model = NamedGraph(_with_emulated_rounding(content, path) if is_emulated else content, path)
        del content  # as large as the weights
        providers = self._providers(entry)
        session = make_session(self._runtime, model, self.device, self.threads, entry.precision, providers)
        try:
            inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} contains names that are not UTF-8. Export the bundle again.") from error
        check_tensors(path, entry, inputs, outputs)
        return session

    def _providers(self, entry: GraphEntry) -> list[Provider]:
        """Return the execution providers for a graph, in order, with their options."""
        return [(PROVIDERS[self.device], {})]


def _specs(tensors: Iterable[Any]) -> list[TensorSpec]:
    """Convert ONNX Runtime's inputs or outputs to the manifest's form."""
    return [
        TensorSpec(
            name=tensor.name,
            dtype=_TYPES.get(tensor.type, tensor.type),
            shape=tuple(side if isinstance(side, int) else str(side) for side in tensor.shape),
        )
        for tensor in tensors
    ]


def _cast_input(value: NDArray[np.generic], half: bool) -> NDArray[np.generic]:
    """Return an input in the type of the graph's input, float16 or unchanged."""
    return np.ascontiguousarray(value, np.float16 if half else None)


def _with_emulated_rounding(content: bytes, path: Path) -> bytes:
    """Return a 16-bit graph as an FP32 graph with the same rounding."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise EnvironmentIssue(
            f"Emulating BF16 or FP16 on a CPU needs onnx ({error}). Install: pip install 'cclip-deploy[export]'"
        ) from error
    from cclip_deploy.graph.parse import parse_graph
    from cclip_deploy.graph.precision.rounding import emulate_rounding

    return bytes(emulate_rounding(parse_graph(content, path)).SerializeToString())
