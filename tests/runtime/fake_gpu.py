"""Fake GPU for tests: it records calls, and executes the work of a stream only at a synchronization.

Code that relies on an order that CUDA does not guarantee therefore fails here, as do leaks, double frees, copies beyond
a buffer, and waits inside a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.runtime.tensorrt.device import Bytes, GpuFacts, GpuInterface

FACTS = GpuFacts("Fake GPU", "8.9", 24 << 30, "13.0")
Work = Callable[[], None]


@dataclass(eq=False)
class FakeStream:
    number: int
    pending: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    is_open: bool = True

    def put(self, work: Work) -> None:
        assert self.is_open, "work on a closed stream"
        (self.pending if self.capturing is None else self.capturing).append(work)


@dataclass(eq=False)
class FakeGraph:
    work: list[Work]
    is_open: bool = True


class FakeGpu:
    """Fake device. `calls` lists the calls in order; `fail_at` makes the nth call of a name fail, which sets
    `has_failed`.
    """

    interface: GpuInterface = "cuda-python"

    def __init__(self, fail_at: tuple[str, int] | None = None, facts: GpuFacts = FACTS) -> None:
        self.facts = facts
        self.calls: list[str] = []
        self.fail_at = fail_at
        self.has_failed = False
        self.blocks: dict[int, Bytes] = {}
        self.pinned: list[Bytes] = []
        self.streams: dict[int, FakeStream] = {}
        self.graphs: list[FakeGraph] = []
        self.events: list[Any] = []
        self.is_closed = False
        self._next = 0x1000

    def note(self, name: str) -> None:
        assert not self.is_closed, f"{name} after close"
        self.calls.append(name)
        if self.fail_at == (name, self.calls.count(name)):
            self.has_failed = True
            raise EnvironmentIssue(f"{name} failed: injected fault (CUDA error 2).")

    def allocate(self, n_bytes: int) -> int:
        self._not_capturing("allocate")
        self.note("allocate")
        address, self._next = self._next, self._next + (n_bytes + 511) // 256 * 256
        self.blocks[address] = np.full(n_bytes, 0xAB, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.note("free")
        assert address in self.blocks, "freed twice, or never allocated"
        del self.blocks[address]

    def allocate_pinned(self, n_bytes: int) -> Bytes:
        self.note("allocate_pinned")
        self.pinned.append(np.full(n_bytes, 0xCD, np.uint8))
        return self.pinned[-1]

    def free_pinned(self, memory: Bytes) -> None:
        self.note("free_pinned")
        left = [block for block in self.pinned if block is not memory]
        assert len(left) == len(self.pinned) - 1, "freed twice, or never allocated"
        self.pinned = left

    def copy_in(self, address: int, source: Bytes, stream: FakeStream) -> None:
        self.note("copy_in")
        self._check_copy(source, address)

        def copy() -> None:
            self.blocks[address][: source.nbytes] = source

        stream.put(copy)

    def copy_out(self, target: Bytes, address: int, stream: FakeStream) -> None:
        self.note("copy_out")
        self._check_copy(target, address)

        def copy() -> None:
            target[...] = self.blocks[address][: target.nbytes]

        stream.put(copy)

    def open_stream(self) -> FakeStream:
        self.note("open_stream")
        stream = FakeStream(len(self.streams) + 7)
        self.streams[stream.number] = stream
        return stream

    def close_stream(self, stream: FakeStream) -> None:
        self.note("close_stream")
        assert stream.is_open
        stream.is_open = False

    def stream_address(self, stream: FakeStream) -> int:
        return stream.number

    def synchronize(self, stream: FakeStream) -> None:
        assert stream.capturing is None, "a wait inside a capture"
        self.note("synchronize")
        work, stream.pending = stream.pending, []
        for do in work:
            do()

    def open_event(self) -> object:
        self.note("open_event")
        self.events.append(object())
        return self.events[-1]

    def close_event(self, event: object) -> None:
        self.note("close_event")
        self.events.remove(event)

    def record(self, event: object, stream: FakeStream) -> None:
        self.note("record")
        stream.put(lambda: None)

    def milliseconds_between(self, start: object, end: object) -> float:
        return 0.25

    def begin_capture(self, stream: FakeStream) -> None:
        self.note("begin_capture")
        stream.capturing = []

    def end_capture(self, stream: FakeStream) -> FakeGraph:
        work, stream.capturing = stream.capturing, None
        self.note("end_capture")
        assert work is not None
        self.graphs.append(FakeGraph(work))
        return self.graphs[-1]

    def launch(self, graph: FakeGraph, stream: FakeStream) -> None:
        self.note("launch")
        assert graph.is_open
        for work in graph.work:
            stream.put(work)

    def close_graph(self, graph: FakeGraph) -> None:
        self.note("close_graph")
        assert graph.is_open
        graph.is_open = False

    def free_bytes(self) -> int:
        return self.facts.memory_bytes - sum(block.nbytes for block in self.blocks.values())

    def enter_thread(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def leaks(self) -> dict[str, int]:
        """Return the number of unreleased resources by kind."""
        held = {
            "device memory": len(self.blocks),
            "pinned memory": len(self.pinned),
            "streams": sum(stream.is_open for stream in self.streams.values()),
            "graphs": sum(graph.is_open for graph in self.graphs),
            "events": len(self.events),
        }
        return {kind: count for kind, count in held.items() if count}

    def _not_capturing(self, name: str) -> None:
        assert all(stream.capturing is None for stream in self.streams.values()), f"{name} inside a capture"

    def _check_copy(self, host: Bytes, address: int) -> None:
        assert address in self.blocks, "a copy from or to memory that is not allocated"
        assert host.nbytes <= self.blocks[address].nbytes, "a copy beyond the device buffer"
        assert any(np.shares_memory(host, block) for block in self.pinned), "a copy of memory that is not pinned"
