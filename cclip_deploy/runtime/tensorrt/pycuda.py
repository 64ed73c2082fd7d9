"""GPU access through pycuda. Not tested on a GPU: pycuda has no wheels and could not be compiled for the tests."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.runtime.tensorrt.device import DRIVER_REMEDY, Bytes, GpuFacts, GpuInterface, Handle, version_text

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream, which other libraries use


def load_pycuda_driver() -> Any:
    """Import pycuda.driver; raise EnvironmentIssue if it, or the driver library that it links to, is missing."""
    try:
        from pycuda import driver
    except ModuleNotFoundError as error:
        raise EnvironmentIssue(
            f"pycuda cannot be imported ({error}). Install it, which compiles it and needs the CUDA toolkit: "
            "pip install pycuda; or use cuda-python, which has wheels: --gpu-interface cuda-python"
        ) from error
    except ImportError as error:
        raise EnvironmentIssue(f"pycuda does not load: {error}. {DRIVER_REMEDY}") from error
    return driver


class PyCudaGpu:
    """Device 0 through pycuda, in its primary context, which TensorRT and ONNX Runtime share."""

    interface: GpuInterface = "pycuda"

    def __init__(self) -> None:
        self._driver = load_pycuda_driver()
        try:
            self._driver.init()
            if not self._driver.Device.count():
                raise EnvironmentIssue(f"pycuda finds no NVIDIA GPU. {DRIVER_REMEDY}")
            self._device = self._driver.Device(0)
            self._context = self._device.retain_primary_context()
            self._context.push()
        except self._driver.Error as error:
            raise EnvironmentIssue(f"pycuda cannot use the GPU: {error}. {DRIVER_REMEDY}") from error
        major, minor = self._device.compute_capability()
        self.facts = GpuFacts(
            name=self._device.name(),
            compute_capability=f"{major}.{minor}",
            memory_bytes=int(self._device.total_memory()),
            driver_cuda=version_text(self._driver.get_driver_version()),
        )
        self._blocks: dict[int, Any] = {}
        self._entered = threading.local()
        self._entered.yes = True

    def allocate(self, n_bytes: int) -> int:
        block = self._call("mem_alloc", self._driver.mem_alloc, max(n_bytes, 1))
        self._blocks[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        self._call("free", self._blocks.pop(address).free)

    def allocate_pinned(self, n_bytes: int) -> Bytes:
        memory: Bytes = self._call("pagelocked_empty", self._driver.pagelocked_empty, n_bytes, np.uint8)
        return memory

    def free_pinned(self, memory: Bytes) -> None:
        self._call("free", memory.base.free)  # type: ignore[union-attr]

    def copy_in(self, address: int, source: Bytes, stream: Handle) -> None:
        self._call("memcpy_htod_async", self._driver.memcpy_htod_async, address, source, stream)

    def copy_out(self, target: Bytes, address: int, stream: Handle) -> None:
        self._call("memcpy_dtoh_async", self._driver.memcpy_dtoh_async, target, address, stream)

    def open_stream(self) -> Handle:
        return self._call("Stream", self._driver.Stream, NON_BLOCKING)

    def close_stream(self, stream: Handle) -> None:
        """Do nothing: pycuda destroys a stream with its last reference."""

    def stream_address(self, stream: Handle) -> int:
        return int(stream.handle)

    def synchronize(self, stream: Handle) -> None:
        self._call("synchronize", stream.synchronize)

    def open_event(self) -> Handle:
        return self._call("Event", self._driver.Event)

    def close_event(self, event: Handle) -> None:
        """Do nothing: pycuda destroys an event with its last reference."""

    def record(self, event: Handle, stream: Handle) -> None:
        self._call("record", event.record, stream)

    def milliseconds_between(self, start: Handle, end: Handle) -> float:
        self._call("synchronize", end.synchronize)
        return float(start.time_till(end))

    def begin_capture(self, stream: Handle) -> None:
        if not hasattr(stream, "begin_capture"):
            raise EnvironmentIssue(
                "This pycuda cannot capture CUDA graphs. Leave --cuda-graphs out, or use --gpu-interface cuda-python."
            )
        self._call("begin_capture", stream.begin_capture)

    def end_capture(self, stream: Handle) -> Handle:
        return self._call("instantiate", self._call("end_capture", stream.end_capture).instantiate)

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call("launch", graph.launch, stream)

    def close_graph(self, graph: Handle) -> None:
        """Do nothing: pycuda destroys a graph with its last reference."""

    def free_bytes(self) -> int:
        return int(self._call("mem_get_info", self._driver.mem_get_info)[0])

    def enter_thread(self) -> None:
        if not getattr(self._entered, "yes", False):
            self._context.push()
            self._entered.yes = True

    def close(self) -> None:
        self._context.pop()
        self._context.detach()

    def _call(self, what: str, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._driver.Error as error:
            raise EnvironmentIssue(f"pycuda's {what} failed: {error}. Run cclip-deploy doctor.") from error
