"""Interface to a GPU: memory, copies, streams, events and CUDA graphs. `cuda_python` and `pycuda` implement it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

GpuInterface = Literal["cuda-python", "pycuda"]
DRIVER_REMEDY = "Install the NVIDIA driver; in a container, start it with: docker run --gpus all"
Handle = Any
"""A stream, an event or a captured graph, as an object of the underlying package."""

Bytes = NDArray[np.uint8]


def version_text(number: int) -> str:
    """Format CUDA's version number: 13010 -> "13.1"."""
    return f"{number // 1000}.{number % 1000 // 10}"


@dataclass(frozen=True)
class GpuFacts:
    """The device: its compute capability as "8.9", the CUDA version of its driver as "13.0"."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver_cuda: str


class Gpu(Protocol):
    """Device 0 of this machine. Addresses are device addresses; copies and launches are asynchronous, on a stream.

    Every method raises EnvironmentIssue with CUDA's message if CUDA reports an error. Callers must free and close what
    they allocate and open; `Ownership` does so.
    """

    interface: GpuInterface
    facts: GpuFacts

    def allocate(self, n_bytes: int) -> int:
        """Allocate device memory, aligned to 256 bytes, and return its address."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, n_bytes: int) -> Bytes:
        """Allocate page-locked host memory, which asynchronous copies require."""
        ...

    def free_pinned(self, memory: Bytes) -> None: ...

    def copy_in(self, address: int, source: Bytes, stream: Handle) -> None:
        """Copy all of `source`, which must be pinned, from host to device."""
        ...

    def copy_out(self, target: Bytes, address: int, stream: Handle) -> None:
        """Copy from device to host until `target`, which must be pinned, is full."""
        ...

    def open_stream(self) -> Handle: ...

    def close_stream(self, stream: Handle) -> None: ...

    def stream_address(self, stream: Handle) -> int:
        """Return the stream's address, as TensorRT takes it."""
        ...

    def synchronize(self, stream: Handle) -> None:
        """Wait until all work on the stream is done; raise the error of failed work."""
        ...

    def open_event(self) -> Handle: ...

    def close_event(self, event: Handle) -> None: ...

    def record(self, event: Handle, stream: Handle) -> None: ...

    def milliseconds_between(self, start: Handle, end: Handle) -> float:
        """Return the device time between two recorded events; waits for the later one."""
        ...

    def begin_capture(self, stream: Handle) -> None: ...

    def end_capture(self, stream: Handle) -> Handle:
        """Return the captured work as a graph that can be launched."""
        ...

    def launch(self, graph: Handle, stream: Handle) -> None: ...

    def close_graph(self, graph: Handle) -> None: ...

    def free_bytes(self) -> int:
        """Return the free device memory in bytes."""
        ...

    def enter_thread(self) -> None:
        """Make the device current in the calling thread; every thread but the opening one calls it first."""
        ...

    def close(self) -> None: ...


class Ownership:
    """Resources that one owner allocated on a GPU; closing it frees the remaining ones."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._stack = ExitStack()
        self._blocks: dict[int, int] = {}
        self._pinned: dict[int, Bytes] = {}

    def allocate(self, n_bytes: int) -> int:
        address = self.gpu.allocate(n_bytes)
        self._blocks[address] = n_bytes
        return address

    def free(self, address: int) -> None:
        del self._blocks[address]
        self.gpu.free(address)

    def allocate_pinned(self, n_bytes: int) -> Bytes:
        memory = self.gpu.allocate_pinned(n_bytes)
        self._pinned[id(memory)] = memory
        return memory

    def free_pinned(self, memory: Bytes) -> None:
        del self._pinned[id(memory)]
        self.gpu.free_pinned(memory)

    def open_stream(self) -> Handle:
        stream = self.gpu.open_stream()
        self._stack.callback(self.gpu.close_stream, stream)
        return stream

    @contextmanager
    def event(self) -> Iterator[Handle]:
        event = self.gpu.open_event()
        try:
            yield event
        finally:
            self.gpu.close_event(event)

    @property
    def device_bytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(self._blocks.values())

    def close(self) -> None:
        """Free everything, even if freeing something fails; the first failure is raised at the end."""
        for address in list(self._blocks):
            self._stack.callback(self.free, address)
        for memory in list(self._pinned.values()):
            self._stack.callback(self.free_pinned, memory)
        self._stack.close()
