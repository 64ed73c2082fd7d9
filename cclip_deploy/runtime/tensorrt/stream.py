"""Execution stream: a CUDA stream with the contexts, buffers and scratch memory of the engines that run on it.

The engines of a stream run one after the other, so they share one block of scratch memory, of the largest size that any
of them needs. Streams share only the engines' weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import DeviceTensor, TensorsOrArrays
from cclip_deploy.runtime.tensorrt.context import Buffers, EngineContext, LoadedEngine, Shape, n_bytes_of
from cclip_deploy.runtime.tensorrt.device import Bytes, Gpu, Ownership

if TYPE_CHECKING:
    from types import ModuleType

Floats = NDArray[np.float32]


class DeviceArray:
    """An output that stays on the GPU; its memory returns to its stream with the last reference to it."""

    def __init__(self, owner: ExecutionStream, address: int, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.owner = owner
        self.address = address
        self.dtype = dtype
        self._shape = shape
        self._release = weakref.finalize(self, owner.give_back, address, n_bytes_of(shape, dtype))
        self._release.atexit = False

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def is_open(self) -> bool:
        """Whether the memory still belongs to this array."""
        return self._release.alive and not self.owner.is_closed

    def numpy(self) -> Floats:
        return self.owner.read(self)

    def wait(self) -> None:
        self.owner.wait()

    def close(self) -> None:
        self._release()


class ExecutionStream:
    """Runs engines on one CUDA stream, for one thread at a time. Closing it frees all its memory."""

    def __init__(self, gpu: Gpu, binding: ModuleType, cuda_graphs: bool) -> None:
        self.is_closed = False
        self._gpu = gpu
        self._binding = binding
        self._cuda_graphs = cuda_graphs
        self._owned = Ownership(gpu)
        self.stream = self._owned.open_stream()
        self._contexts: dict[str, EngineContext] = {}
        self._activation: tuple[int, int] = (0, 0)
        self._spare: dict[int, list[int]] = {}

    @property
    def device_bytes(self) -> int:
        """Device memory held by this stream in bytes, without the engines' weights."""
        return self._owned.device_bytes

    def add(self, loaded: LoadedEngine) -> None:
        """Create a context of an engine unless there is one."""
        if loaded.graph in self._contexts:
            return
        context = EngineContext(loaded, self._gpu, self._binding, self._cuda_graphs)
        self._contexts[loaded.graph] = context
        try:
            self._share_activation_memory(context)
        except BaseException:
            self.remove(loaded.graph)
            raise

    def remove(self, graph: str) -> None:
        """Free the context and the buffers of an engine, if there are any."""
        context = self._contexts.pop(graph, None)
        if context is None:
            return
        self.wait()
        context.close()
        for buffers in context.buffers.values():
            self._free(buffers)
        for addresses in self._spare.values():
            while addresses:
                self._owned.free(addresses.pop())

    def run(
        self, graph: str, inputs: TensorsOrArrays, on_device: Sequence[str] | None = None
    ) -> tuple[dict[str, Floats], dict[str, DeviceTensor]]:
        """Run once; copy all outputs to the host, or leave those named in `on_device` there and return no others."""
        context = self._contexts[graph]
        if context.is_busy:
            self.wait()
        stored: dict[str, DeviceArray] = {}
        try:
            arrays = self._prepare(context, inputs)
            shapes = context.bind_shapes({name: value.shape for name, value in arrays.items()}, self.stream)
            for name in on_device or ():
                stored[name] = self._take(shapes[name], context.types[name])
            self._enqueue(context, arrays, shapes, stored)
            if on_device is not None and not _foreign(arrays, self):
                return {}, dict(stored)
            host = {} if on_device is not None else self._copy_out(context, shapes)
            self.wait()
            return {name: _as_floats(view) for name, view in host.items()}, dict(stored)
        except BaseException:
            self._wait_ignoring_errors()
            for array in stored.values():
                array.close()
            raise

    def device_times_ms(self, graph: str, inputs: TensorsOrArrays, runs: int) -> list[float]:
        """Return the device time of each of `runs` runs without copies, after one warm-up run."""
        self.run(graph, inputs)
        context, times = self._contexts[graph], []
        key = context.last_key
        with self._owned.event() as start, self._owned.event() as end:
            for _ in range(runs):
                self._gpu.record(start, self.stream)
                context.execute(self.stream, key)
                self._gpu.record(end, self.stream)
                times.append(self._gpu.milliseconds_between(start, end))
        self.wait()
        return times

    def read(self, array: DeviceArray) -> Floats:
        """Copy a device output to the host."""
        if not array.is_open:
            raise UsageError("This output was freed: the array or its backend was closed. Compute it again.")
        memory = self._owned.allocate_pinned(n_bytes_of(array.shape, array.dtype))
        try:
            self._gpu.copy_out(memory, array.address, self.stream)
            self.wait()
            return _as_floats(memory.view(array.dtype).reshape(array.shape))
        finally:
            self._owned.free_pinned(memory)

    def give_back(self, address: int, n_bytes: int) -> None:
        """Take back the memory of a device output; stream order ensures that it is read before it is overwritten."""
        if not self.is_closed:
            self._spare.setdefault(n_bytes, []).append(address)

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self._gpu.synchronize(self.stream)
        for context in self._contexts.values():
            context.is_busy = False

    def close(self) -> None:
        """Free contexts, graphs, buffers and the stream, also after errors."""
        if self.is_closed:
            return
        self.is_closed = True
        try:
            self._wait_ignoring_errors()
            for context in self._contexts.values():
                context.close()
        finally:
            self._contexts.clear()
            self._owned.close()

    def _prepare(self, context: EngineContext, inputs: TensorsOrArrays) -> dict[str, NDArray[Any] | DeviceArray]:
        """Convert host inputs to the engine's types, and wait for device inputs of other streams."""
        prepared: dict[str, NDArray[Any] | DeviceArray] = {}
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                if not value.is_open:
                    raise UsageError(f"Input {name} was freed before it was used. Compute it again.")
                if value.dtype != context.types.get(name, value.dtype):
                    raise UsageError(
                        f"Input {name} is {value.dtype} on the device, the engine takes {context.types[name]}. Build "
                        "both engines with the same --io."
                    )
                prepared[name] = value
            else:
                array = value if isinstance(value, np.ndarray) else value.numpy()
                prepared[name] = np.ascontiguousarray(array, context.types.get(name, array.dtype))
        for other in _foreign(prepared, self):
            other.wait()
        return prepared

    def _enqueue(
        self,
        context: EngineContext,
        inputs: Mapping[str, NDArray[Any] | DeviceArray],
        shapes: Mapping[str, Shape],
        stored: Mapping[str, DeviceArray],
    ) -> None:
        addresses = {name: value.address for name, value in inputs.items() if isinstance(value, DeviceArray)}
        addresses |= {name: array.address for name, array in stored.items()}
        for name, shape in shapes.items():
            if name not in stored:
                addresses[name] = self._buffers_for(context, name, n_bytes_of(shape, context.types[name])).address
        pinned: dict[str, Bytes] = {}
        for name, value in inputs.items():
            if not isinstance(value, DeviceArray):
                buffers = self._buffers_for(context, name, value.nbytes)
                addresses[name], pinned[name] = buffers.address, self._pinned_for(buffers, value.nbytes)
        context.is_busy = True
        for name, memory in pinned.items():
            memory[...] = inputs[name].reshape(-1).view(np.uint8)  # type: ignore[union-attr]
            self._gpu.copy_in(addresses[name], memory, self.stream)
        context.bind_addresses(addresses)
        sizes = {name: value.shape for name, value in inputs.items()}
        context.execute(self.stream, _key(sizes, addresses))

    def _copy_out(self, context: EngineContext, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
        views = {}
        for name, shape in shapes.items():
            dtype = context.types[name]
            buffers = context.buffers[name]
            pinned = self._pinned_for(buffers, n_bytes_of(shape, dtype))
            self._gpu.copy_out(pinned, buffers.address, self.stream)
            views[name] = pinned.view(dtype).reshape(shape)
        return views

    def _buffers_for(self, context: EngineContext, name: str, n_bytes: int) -> Buffers:
        buffers = context.buffers.setdefault(name, Buffers())
        if buffers.n_bytes < n_bytes or not buffers.address:
            self.wait()
            self._free(buffers)
            buffers.address, buffers.n_bytes = self._owned.allocate(n_bytes), n_bytes
        return buffers

    def _pinned_for(self, buffers: Buffers, n_bytes: int) -> Bytes:
        if buffers.pinned is None or buffers.pinned.nbytes < n_bytes:
            if buffers.pinned is not None:
                self.wait()
                old, buffers.pinned = buffers.pinned, None
                self._owned.free_pinned(old)
            buffers.pinned = self._owned.allocate_pinned(max(n_bytes, buffers.n_bytes))
        return buffers.pinned[:n_bytes]

    def _free(self, buffers: Buffers) -> None:
        address, buffers.address, buffers.n_bytes = buffers.address, 0, 0
        pinned, buffers.pinned = buffers.pinned, None
        if address:
            self._owned.free(address)
        if pinned is not None:
            self._owned.free_pinned(pinned)

    def _take(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        n_bytes = n_bytes_of(shape, dtype)
        spare = self._spare.get(n_bytes)
        address = spare.pop() if spare else self._owned.allocate(n_bytes)
        return DeviceArray(self, address, shape, dtype)

    def _share_activation_memory(self, added: EngineContext) -> None:
        address, n_bytes = self._activation
        if added.activation_bytes <= n_bytes:
            added.use_activation_memory(address, n_bytes)
            return
        self.wait()
        self._activation = (0, 0)
        if address:
            self._owned.free(address)
        self._activation = (self._owned.allocate(added.activation_bytes), added.activation_bytes)
        for context in self._contexts.values():
            context.use_activation_memory(*self._activation)

    def _wait_ignoring_errors(self) -> None:
        try:
            self.wait()
        except EnvironmentIssue:
            # The error that broke the stream has already been raised to the caller.
            for context in self._contexts.values():
                context.is_busy = False


def _foreign(inputs: Mapping[str, Any], stream: ExecutionStream) -> set[ExecutionStream]:
    """Return the other streams on which these inputs are stored."""
    return {value.owner for value in inputs.values() if isinstance(value, DeviceArray) and value.owner is not stream}


def _key(shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> Hashable:
    return tuple(sorted(shapes.items())), tuple(sorted(addresses.items()))


def _as_floats(view: NDArray[Any]) -> Floats:
    """Return a float32 copy, because the next run overwrites the view's memory."""
    return np.array(view, dtype=np.float32)
