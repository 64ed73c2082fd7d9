"""One execution context of one engine: its inputs and outputs, its optimization profiles, its captured CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt.binding import create_context, numpy_type
from cclip_deploy.runtime.tensorrt.device import Bytes, Gpu, Handle

if TYPE_CHECKING:
    from types import ModuleType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine in memory; `runtime` made it and outlives it, `complaints` grows with what TensorRT says is wrong."""

    graph: str
    runtime: Any
    engine: Any
    complaints: list[str] = field(default_factory=list)

    def says(self) -> str:
        """TensorRT's last complaints, in one line."""
        return " | ".join(self.complaints[-3:]) or "nothing"


@dataclass
class Buffers:
    """The device and the pinned host memory of one tensor; both grow, neither shrinks."""

    address: int = 0
    n_bytes: int = 0
    pinned: Bytes | None = None


class EngineContext:
    """Shapes, addresses and launches of one engine on one stream. The activation memory is the owner's."""

    def __init__(self, loaded: LoadedEngine, gpu: Gpu, binding: ModuleType, with_graphs: bool) -> None:
        self.loaded = loaded
        self.buffers: dict[str, Buffers] = {}
        self.is_busy = False
        self._gpu = gpu
        self._with_graphs = with_graphs
        engine = loaded.engine
        self._context, self.activation_bytes = create_context(binding, engine, with_graphs)
        if self._context is None:
            raise EnvironmentIssue(f"TensorRT made no execution context of {loaded.graph}. It says: {loaded.says()}")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.types = {name: numpy_type(binding, engine.get_tensor_dtype(name)) for name in names}
        is_input = {name: engine.get_tensor_mode(name) == binding.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._profiles = [self._profile(index) for index in range(engine.num_optimization_profiles)]
        # A second context of an engine begins with none (-1) in some versions.
        self._active_profile = int(self._context.active_optimization_profile)
        self._graph: Handle | None = None
        self._graph_of: Hashable = None
        self.last_key: Hashable = None

    def use_activation_memory(self, address: int, n_bytes: int) -> None:
        """Take the scratch memory of the next runs; a graph that was captured on another is dropped."""
        self.drop_graph()
        if self.activation_bytes:
            self._context.set_device_memory(address, n_bytes)

    def bind_shapes(self, shapes: Mapping[str, Shape], stream: Handle) -> dict[str, Shape]:
        """Choose the profile, set the inputs' shapes, and say the outputs'.

        Raises:
            UsageError: other inputs than the engine's, or shapes outside all its profiles.
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
        self._require(not missing, f"tell its output shapes: {', '.join(missing)} unknown")
        return {name: tuple(int(s) for s in self._context.get_tensor_shape(name)) for name in self.outputs}

    def bind_addresses(self, addresses: Mapping[str, int]) -> None:
        """Say where every input is and every output goes."""
        for name, address in addresses.items():
            self._require(self._context.set_tensor_address(name, address), f"take an address for {name}")

    def execute(self, stream: Handle, key: Hashable) -> None:
        """Put one run on the stream; `key` is what a captured graph depends on, shapes and addresses.

        With CUDA graphs the first run of a key goes as it is, which also makes TensorRT ready for it, the second is
        captured, and from then on the graph is launched. A shape that comes but once costs no capture.
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
        """Forget the captured graph, if there is one."""
        graph, self._graph, self._graph_of, self.last_key = self._graph, None, None, None
        if graph is not None:
            self._gpu.close_graph(graph)

    def close(self) -> None:
        """Give up the graph and the context; buffers belong to the lane."""
        self.drop_graph()
        self._context = None

    def _enqueue(self, stream: Handle) -> None:
        self._require(self._context.execute_async_v3(self._gpu.stream_address(stream)), "run")

    def _capture(self, stream: Handle) -> Handle:
        label = f"{self.loaded.graph} cannot be captured as a CUDA graph"
        remedy = "Leave --cuda-graphs out to run it as it is."
        asks = getattr(self._context, "is_stream_capturable", None)
        if asks is not None and not asks(self._gpu.stream_address(stream)):
            raise EnvironmentIssue(f"{label}: TensorRT says that this engine is not capturable. {remedy}")
        self._gpu.begin_capture(stream)
        try:
            is_taken = bool(self._context.execute_async_v3(self._gpu.stream_address(stream)))
        finally:
            # A stream that is left capturing takes no other work, so the capture ends whatever happened in it.
            try:
                graph = self._gpu.end_capture(stream)
            except EnvironmentIssue as error:
                raise EnvironmentIssue(f"{label}: {error} TensorRT says: {self.loaded.says()}. {remedy}") from error
        if not is_taken:
            self._gpu.close_graph(graph)
            raise EnvironmentIssue(f"{label}. TensorRT says: {self.loaded.says()}. {remedy}")
        return graph

    def _profile(self, index: int) -> dict[str, tuple[Shape, Shape]]:
        """The smallest and largest shape of every input."""
        engine, found = self.loaded.engine, {}
        for name in self.inputs:
            least, _, most = engine.get_tensor_profile_shape(name, index)
            found[name] = (tuple(int(side) for side in least), tuple(int(side) for side in most))
        return found

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """The profile with the least room of those that fit: it was tuned the closest to these shapes."""
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
            f"The engine of {self.loaded.graph} was built for {ranges}; {given} is outside. Send less at once, or "
            "build it with a larger --max-batch or --max-prompts."
        )

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise EnvironmentIssue(
                f"The engine of {self.loaded.graph} would not {what}. TensorRT says: {self.loaded.says()}"
            )


def n_bytes_of(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """The size of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def _fits(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(a <= s <= b for s, a, b in zip(shape, least, most, strict=True))
