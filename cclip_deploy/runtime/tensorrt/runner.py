"""TensorRT and TensorRT-RTX engines of a bundle, run on a GPU. Not yet run on one: see docs/gpu.md.

Every engine is loaded once; each lane has its own contexts of it, a stream and memory, so as many threads as there are
lanes run at a time. The picture's features stay on the GPU between the image encoder and the mask decoder.
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

MOST_LANES = 16


@dataclass(frozen=True)
class GpuOptions:
    """How engines are run: through which package, whether as CUDA graphs, and in how many lanes."""

    interface: GpuInterface = "cuda-python"
    cuda_graphs: bool = False
    lanes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= MOST_LANES:
            raise UsageError(f"{self.lanes} lanes make no sense. Give 1 to {MOST_LANES}.")


class TensorRtBackend:
    """A bundle's engines of one precision; each is loaded when it is first asked for. Close it, or use it in `with`."""

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
        """Find the binding, the GPU and the engines, and hold the manifest against them; nothing is loaded yet.

        Args:
            bundle: where the engines are.
            precision: of the engines.
            name: the binding that built them and runs them.
            options: how they are run.
            gpu: an open device, instead of the one that `options` names.
            binding: an imported binding, instead of the one that `name` names.

        Raises:
            EnvironmentIssue: the binding, the package for device memory, the driver or the GPU is missing or too old,
                or an engine was built for another version or GPU.
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
        self._lanes: list[ExecutionStream] = []
        self._free: queue.LifoQueue[ExecutionStream] = queue.LifoQueue()
        self._is_closed = False
        try:
            for _ in range(options.lanes):
                self._lanes.append(ExecutionStream(self.gpu, self._binding, options.cuda_graphs))
                self._free.put(self._lanes[-1])
        except BaseException:
            self.close()
            raise

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that there are engines of."""
        return tuple(self._entries)

    @property
    def entries(self) -> tuple[EngineEntry, ...]:
        """The engines that are run."""
        return tuple(self._entries.values())

    @property
    def device_bytes(self) -> int:
        """Device memory of buffers and scratch, without the engines' weights."""
        return sum(lane.device_bytes for lane in self._lanes)

    def load(self, graph: str) -> None:
        with self._all_lanes() as lanes:
            loaded = self._engine(graph)
            for lane in lanes:
                lane.add(loaded)

    def unload(self, graph: str) -> None:
        with self._all_lanes() as lanes:
            for lane in lanes:
                lane.remove(graph)
            self._loaded.pop(graph, None)

    def run(self, graph: str, inputs: TensorsOrArrays) -> dict[str, NDArray[np.float32]]:
        with self._lane(graph) as lane:
            return lane.run(graph, inputs)[0]

    def run_on_device(self, graph: str, inputs: TensorsOrArrays, names: Sequence[str]) -> dict[str, DeviceTensor]:
        with self._lane(graph) as lane:
            return lane.run(graph, inputs, names)[1]

    def device_times_ms(self, graph: str, inputs: TensorsOrArrays, runs: int) -> list[float]:
        """Device time of each of so many runs, without copies; the runs of one lane, one after the other."""
        with self._lane(graph) as lane:
            return lane.device_times_ms(graph, inputs, runs)

    def close(self) -> None:
        """Free everything; what was kept on the GPU cannot be read afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        failures = []
        for lane in self._lanes:
            try:
                lane.close()
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
        """The engine of a graph; UsageError that names the command which builds it where there is none."""
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
    def _lane(self, graph: str) -> Iterator[ExecutionStream]:
        """A lane that nobody else uses, with a context of the graph's engine; waits for one."""
        self._require_open()
        self.gpu.enter_thread()
        loaded = self._engine(graph)
        lane = self._free.get()
        try:
            lane.add(loaded)
            yield lane
        finally:
            self._free.put(lane)

    @contextmanager
    def _all_lanes(self) -> Iterator[list[ExecutionStream]]:
        """Every lane, when the runs that are under way have ended."""
        self._require_open()
        with self._loading:
            taken: list[ExecutionStream] = []
            try:
                taken += (self._free.get() for _ in self._lanes)
                self.gpu.enter_thread()
                yield taken
            finally:
                for lane in taken:
                    self._free.put(lane)

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("This backend was closed. Open another one.")
