"""ONNX Runtime on a CPU; and what it shares with its GPU providers: a session that runs where it was asked to."""

from __future__ import annotations

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
            is_narrow = self.rounds_as_written and entry.precision.rest == "fp16"
            widens = self.device == "cpu" and (is_narrow or entry.precision == "bf16")
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
