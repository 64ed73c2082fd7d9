"""Execution context of an engine: shapes, optimization profiles and the captured CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import create_context, join_errors, numpy_type
from cclip_deploy.runtime.tensorrt.device import Bytes, Gpu, Handle

if TYPE_CHECKING:
    from types import ModuleType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialized engine. `runtime` must outlive it; `errors` collects TensorRT's error messages."""

    graph: str
    runtime: Any
    engine: Any
    errors: list[str] = field(default_factory=list)

    def last_errors(self) -> str:
        """Return TensorRT's last error messages in one line."""
        return join_errors(self.errors)


@dataclass
class Buffers:
    """Device and pinned host memory of one tensor; both only grow."""

    address: int = 0
    n_bytes: int = 0
    pinned: Bytes | None = None


class EngineContext:
    """Shapes, addresses and launches of one engine on one stream. The stream owns the activation memory."""

    def __init__(self, loaded: LoadedEngine, gpu: Gpu, binding: ModuleType, with_graphs: bool) -> None:
        self.loaded = loaded
        self.buffers: dict[str, Buffers] = {}
        self.is_busy = False
        self._gpu = gpu
        self._with_graphs = with_graphs
        engine = loaded.engine
        self._context, self.activation_bytes = create_context(binding, engine, with_graphs)
        if self._context is None:
            raise EnvironmentIssue(f"TensorRT created no execution context for {loaded.graph}: {loaded.last_errors()}")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.types = {name: numpy_type(binding, engine.get_tensor_dtype(name)) for name in names}
        is_input = {name: engine.get_tensor_mode(name) == binding.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._profiles = [self._profile(index) for index in range(engine.num_optimization_profiles)]
        # In some versions a second context of an engine starts without a profile (-1).
        self._active_profile = int(self._context.active_optimization_profile)
        self._graph: Handle | None = None
        self._graph_of: Hashable = None
        self.last_key: Hashable = None

    def use_activation_memory(self, address: int, n_bytes: int) -> None:
        """Set the scratch memory of the next runs; a graph captured with other memory is dropped."""
        self.drop_graph()
        if self.activation_bytes:
            self._context.set_device_memory(address, n_bytes)

    def bind_shapes(self, shapes: Mapping[str, Shape], stream: Handle) -> dict[str, Shape]:
        """Choose the profile, set the inputs' shapes and return the outputs' shapes.

        Raises:
            UsageError: the inputs are not those of the engine, or their shapes fit none of its profiles.
        """
        if set(shapes) != set(self.inputs):
            raise UsageError(f"{self.loaded.graph} takes {', '.join(self.inputs)}; {', '.join(shapes)} were given.")
        index = self._choose_profile(shapes)
        if index != self._active_profile:
            address = self._gpu.stream_address(stream)
            self._require(self._context.set_optimization_profile_async(index, address), f"take profile {index}")
            self._active_profile = index
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"take {name} of shape {shape}")
        missing = self._context.infer_shapes()
        self._require(not missing, f"infer its output shapes: {', '.join(missing)} unknown")
        return {name: tuple(int(s) for s in self._context.get_tensor_shape(name)) for name in self.outputs}

    def bind_addresses(self, addresses: Mapping[str, int]) -> None:
        """Set the device addresses of inputs and outputs."""
        for name, address in addresses.items():
            self._require(self._context.set_tensor_address(name, address), f"take an address for {name}")

    def execute(self, stream: Handle, key: Hashable) -> None:
        """Enqueue one run on the stream; `key` identifies the shapes and addresses that a captured graph depends on.

        With CUDA graphs, the first run of a key is enqueued directly, which also prepares TensorRT for it; the second
        run is captured, and from then on the graph is launched. A shape that occurs once is not captured.
        """
        if not self._with_graphs:
            self._enqueue(stream)
        elif self._graph is not None and self._graph_of == key:
            self._gpu.launch(self._graph, stream)
        elif self.last_key != key:
            self.drop_graph()
            self._enqueue(stream)
        else:
            self._graph, self._graph_of = self._capture(stream), key
            self._gpu.launch(self._graph, stream)
        self.last_key = key

    def drop_graph(self) -> None:
        """Free the captured graph, if there is one."""
        graph, self._graph, self._graph_of, self.last_key = self._graph, None, None, None
        if graph is not None:
            self._gpu.close_graph(graph)

    def close(self) -> None:
        """Free the graph and the context; the buffers belong to the stream."""
        self.drop_graph()
        self._context = None

    def _enqueue(self, stream: Handle) -> None:
        self._require(self._context.execute_async_v3(self._gpu.stream_address(stream)), "run")

    def _capture(self, stream: Handle) -> Handle:
        label = f"{self.loaded.graph} cannot be captured as a CUDA graph"
        remedy = "Leave --cuda-graphs out."
        is_capturable = getattr(self._context, "is_stream_capturable", None)
        if is_capturable is not None and not is_capturable(self._gpu.stream_address(stream)):
            raise EnvironmentIssue(f"{label}: TensorRT reports that this engine is not capturable. {remedy}")
        self._gpu.begin_capture(stream)
        try:
            is_enqueued = bool(self._context.execute_async_v3(self._gpu.stream_address(stream)))
        finally:
            # A stream that is still capturing takes no other work, so the capture is ended also after errors.
            try:
                graph = self._gpu.end_capture(stream)
            except EnvironmentIssue as error:
                raise EnvironmentIssue(f"{label}: {error} TensorRT: {self.loaded.last_errors()}. {remedy}") from error
        if not is_enqueued:
            self._gpu.close_graph(graph)
            raise EnvironmentIssue(f"{label}. TensorRT: {self.loaded.last_errors()}. {remedy}")
        return graph

    def _profile(self, index: int) -> dict[str, tuple[Shape, Shape]]:
        """Return the smallest and the largest shape of every input."""
        engine, found = self.loaded.engine, {}
        for name in self.inputs:
            least, _, most = engine.get_tensor_profile_shape(name, index)
            found[name] = (tuple(int(side) for side in least), tuple(int(side) for side in most))
        return found

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Return the smallest profile that fits, which is tuned closest to these shapes."""
        fitting = [
            (sum(math.prod(most) for _, most in profile.values()), index)
            for index, profile in enumerate(self._profiles)
            if all(_fits(shapes[name], least, most) for name, (least, most) in profile.items())
        ]
        if fitting:
            return min(fitting)[1]
        ranges = "; ".join(
            ", ".join(f"{name} {least} to {most}" for name, (least, most) in profile.items())
            for profile in self._profiles
        )
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(
            f"The engine of {self.loaded.graph} was built for {ranges}; {given} is outside. Pass fewer at once, or "
            "build the engine with a larger --max-batch or --max-prompts."
        )

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise EnvironmentIssue(
                f"The engine of {self.loaded.graph} could not {what}. TensorRT: {self.loaded.last_errors()}"
            )


def n_bytes_of(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return the size of a dense tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


def _fits(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(a <= s <= b for s, a, b in zip(shape, least, most, strict=True))
