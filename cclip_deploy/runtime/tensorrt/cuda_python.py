"""GPU access through cuda-python, NVIDIA's bindings of the CUDA runtime. Not tested on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.runtime.tensorrt.device import DRIVER_REMEDY, Bytes, GpuFacts, GpuInterface, Handle, version_text

INSTALL = "pip install cuda-python"
NO_DEVICE, TOO_OLD = 100, 35


def load_cuda_runtime() -> Any:
    """Import cuda.bindings.runtime; raise EnvironmentIssue if it is missing."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EnvironmentIssue(f"cuda-python cannot be imported ({error}). Install it: {INSTALL}") from error
    return runtime


class CudaPythonGpu:
    """Device 0 through the CUDA runtime, in the process's context, which TensorRT and ONNX Runtime share."""

    interface: GpuInterface = "cuda-python"

    def __init__(self) -> None:
        self._runtime = load_cuda_runtime()
        self._require_device()
        self._call("cudaSetDevice", 0)
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name
        self.facts = GpuFacts(
            name=(name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0"),
            compute_capability=f"{properties.major}.{properties.minor}",
            memory_bytes=int(properties.totalGlobalMem),
            driver_cuda=version_text(self._call("cudaDriverGetVersion")),
        )

    def allocate(self, n_bytes: int) -> int:
        return int(self._call("cudaMalloc", max(n_bytes, 1)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, n_bytes: int) -> Bytes:
        address = int(self._call("cudaMallocHost", max(n_bytes, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        self._call("cudaFreeHost", memory.ctypes.data)

    def copy_in(self, address: int, source: Bytes, stream: Handle) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: Bytes, address: int, stream: Handle) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream)

    def open_stream(self) -> Handle:
        # Not ordered with the default stream, which other libraries of the process use.
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def close_stream(self, stream: Handle) -> None:
        self._call("cudaStreamDestroy", stream)

    def stream_address(self, stream: Handle) -> int:
        return int(stream)

    def synchronize(self, stream: Handle) -> None:
        self._call("cudaStreamSynchronize", stream)

    def open_event(self) -> Handle:
        return self._call("cudaEventCreate")

    def close_event(self, event: Handle) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: Handle, stream: Handle) -> None:
        self._call("cudaEventRecord", event, stream)

    def milliseconds_between(self, start: Handle, end: Handle) -> float:
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def begin_capture(self, stream: Handle) -> None:
        # Other threads may allocate during a capture; in this thread, work outside the stream is an error.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Handle) -> Handle:
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def close_graph(self, graph: Handle) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    def enter_thread(self) -> None:
        self._call("cudaSetDevice", 0)

    def close(self) -> None:
        """Do nothing: the runtime's context belongs to the process."""

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; return its one value, or a tuple if it has several."""
        status, *values = getattr(self._runtime, function)(*arguments)
        if int(status):
            raise EnvironmentIssue(f"{function} failed: {self._message(status)}. Run cclip-deploy doctor.")
        return values[0] if len(values) == 1 else tuple(values)

    def _message(self, status: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(status)
        return f"{text.decode() if isinstance(text, bytes) else text} (CUDA error {int(status)})"

    def _require_device(self) -> None:
        status, count = self._runtime.cudaGetDeviceCount()
        if not int(status) and count:
            return
        _, driver = self._runtime.cudaDriverGetVersion()
        _, runtime = self._runtime.cudaRuntimeGetVersion()
        if int(status) == TOO_OLD and driver:
            raise EnvironmentIssue(
                f"The NVIDIA driver is too old: it has CUDA {version_text(driver)}, cuda-python needs "
                f"{version_text(runtime)}. Update the driver, or install an older package: "
                f"pip install 'cuda-python=={driver // 1000}.*'"
            )
        if int(status) in (0, TOO_OLD, NO_DEVICE):
            what = "There is a driver, but no NVIDIA GPU" if driver else "There is no NVIDIA driver here"
            raise EnvironmentIssue(f"{what}, which engines require. {DRIVER_REMEDY}")
        raise EnvironmentIssue(f"The GPU cannot be used: {self._message(status)}. Run cclip-deploy doctor.")
