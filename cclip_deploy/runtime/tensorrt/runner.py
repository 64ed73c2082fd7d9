"""Run a bundle's TensorRT or TensorRT-RTX engines on a GPU. Not yet tested on a GPU, see docs/gpu.md.

Every engine is loaded once. Each execution stream has its own contexts and memory, so as many threads as there are
streams run concurrently. Image features stay on the GPU between the image encoder and the mask decoder.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import EngineEntry
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import UsageError
from cclip_deploy.runtime.backend import DeviceTensor, TensorsOrArrays
from cclip_deploy.runtime.tensorrt.binding import BindingName, load_binding
from cclip_deploy.runtime.tensorrt.context import LoadedEngine
from cclip_deploy.runtime.tensorrt.device import Gpu, GpuInterface
from cclip_deploy.runtime.tensorrt.engine_file import check_engine, engines_of, load_engine
from cclip_deploy.runtime.tensorrt.open_device import open_gpu
from cclip_deploy.runtime.tensorrt.stream import ExecutionStream

if TYPE_CHECKING:
    from types import ModuleType

MAX_STREAMS = 16


@dataclass(frozen=True)
class GpuOptions:
    """How engines run: the package for GPU access, whether to use CUDA graphs, and the number of execution streams."""

    interface: GpuInterface = "cuda-python"
    cuda_graphs: bool = False
    streams: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MAX_STREAMS:
            raise UsageError(f"The number of execution streams must be 1 to {MAX_STREAMS}, got {self.streams}.")


class TensorRtBackend:
    """Backend for a bundle's engines of one precision, each loaded at its first use. Use it in `with`, or close it."""

    device = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        name: BindingName,
        options: GpuOptions | None = None,
        gpu: Gpu | None = None,
        binding: ModuleType | None = None,
    ) -> None:
        """Load the binding, open the GPU and check the engines against the manifest; no engine is loaded yet.

        Args:
            bundle: holds the engines.
            precision: of the engines.
            name: binding that built and runs the engines.
            options: how they are run.
            gpu: an open device, instead of the one that `options` names.
            binding: an imported binding, instead of the one that `name` names.

        Raises:
            EnvironmentIssue: the binding, the package for GPU access, the driver or the GPU is missing or too old, or
                an engine was built for another version or GPU.
            UsageError: the bundle has no such engine.
        """
        options = options or GpuOptions()
        self.name: str = name
        self.precision = precision
        self.bundle = bundle
        self._binding = load_binding(name) if binding is None else binding
        self.gpu = open_gpu(options.interface) if gpu is None else gpu
        try:
            self._entries = engines_of(bundle, name, precision)
            for entry in self._entries.values():
                check_engine(entry, self._binding, self.gpu.facts)
        except BaseException:
            self.gpu.close()
            raise
        self._loaded: dict[str, LoadedEngine] = {}
        self._loading = threading.RLock()
        self._streams: list[ExecutionStream] = []
        self._free: queue.LifoQueue[ExecutionStream] = queue.LifoQueue()
        self._is_closed = False
        try:
            for _ in range(options.streams):
                self._streams.append(ExecutionStream(self.gpu, self._binding, options.cuda_graphs))
                self._free.put(self._streams[-1])
        except BaseException:
            self.close()
            raise

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that have engines."""
        return tuple(self._entries)

    @property
    def entries(self) -> tuple[EngineEntry, ...]:
        """Manifest entries of the engines."""
        return tuple(self._entries.values())

    @property
    def device_bytes(self) -> int:
        """Device memory of buffers and scratch in bytes, without the engines' weights."""
        return sum(stream.device_bytes for stream in self._streams)

    def load(self, graph: str) -> None:
        with self._all_streams() as streams:
            loaded = self._engine(graph)
            for stream in streams:
                stream.add(loaded)

    def unload(self, graph: str) -> None:
        with self._all_streams() as streams:
            for stream in streams:
                stream.remove(graph)
            self._loaded.pop(graph, None)

    def run(self, graph: str, inputs: TensorsOrArrays) -> dict[str, NDArray[np.float32]]:
        with self.reserve_stream(graph) as stream:
            return stream.run(graph, inputs)[0]

    def run_on_device(self, graph: str, inputs: TensorsOrArrays, names: Sequence[str]) -> dict[str, DeviceTensor]:
        with self.reserve_stream(graph) as stream:
            return stream.run(graph, inputs, names)[1]

    def device_times_ms(self, graph: str, inputs: TensorsOrArrays, runs: int) -> list[float]:
        """Return the device time of each of `runs` consecutive runs on one stream, without copies."""
        with self.reserve_stream(graph) as stream:
            return stream.device_times_ms(graph, inputs, runs)

    def close(self) -> None:
        """Free everything; outputs on the device become unreadable."""
        if self._is_closed:
            return
        self._is_closed = True
        failures = []
        for stream in self._streams:
            try:
                stream.close()
            except Exception as error:
                failures.append(error)
        self._loaded.clear()
        self.gpu.close()
        if failures:
            raise failures[0]

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def entry(self, graph: str) -> EngineEntry:
        """Return the manifest entry of a graph's engine; raise UsageError with the build command if there is none."""
        if graph not in self._entries:
            raise UsageError(
                f"{self.bundle.path} has no {self.precision} {self.name} engine of {graph}; it has "
                f"{', '.join(self._entries)}. Build it: "
                f"{Precision(self.precision).build_command(f'--backend {self.name}', f'--graph {graph}')}"
            )
        return self._entries[graph]

    def _engine(self, graph: str) -> LoadedEngine:
        entry = self.entry(graph)
        with self._loading:
            if graph not in self._loaded:
                self._loaded[graph] = load_engine(self.bundle, entry, self._binding, self.gpu.facts)
            return self._loaded[graph]

    @contextmanager
    def reserve_stream(self, graph: str) -> Iterator[ExecutionStream]:
        """Reserve a stream that has a context of the graph's engine; waits until one is free."""
        self._require_open()
        self.gpu.enter_thread()
        loaded = self._engine(graph)
        stream = self._free.get()
        try:
            stream.add(loaded)
            yield stream
        finally:
            self._free.put(stream)

    @contextmanager
    def _all_streams(self) -> Iterator[list[ExecutionStream]]:
        """Reserve all streams, after the runs in progress have ended."""
        self._require_open()
        with self._loading:
            reserved: list[ExecutionStream] = []
            try:
                reserved += (self._free.get() for _ in self._streams)
                self.gpu.enter_thread()
                yield reserved
            finally:
                for stream in reserved:
                    self._free.put(stream)

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("This backend was closed. Open a new one.")
