"""The GPU interface over cuda-python and pycuda: copies, CUDA graphs, memory, and errors for what is missing."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.tensorrt import cuda_python as gpu_cuda_python
from cclip_deploy.runtime.tensorrt import pycuda as gpu_pycuda
from cclip_deploy.runtime.tensorrt.cuda_python import CudaPythonGpu
from cclip_deploy.runtime.tensorrt.device import Gpu, Ownership
from cclip_deploy.runtime.tensorrt.open_device import open_gpu

OK, TOO_OLD, NO_DEVICE, NO_MEMORY = 0, 35, 100, 2


class FakeRuntime:
    """The CUDA runtime over host memory; every function returns its status first, as cuda-python's do."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __init__(self, count: tuple[int, int | None] = (OK, 1), driver: int = 13000) -> None:
        self.count = count
        self.driver = driver
        self.blocks: dict[int, np.ndarray] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            results = {"cudaStreamCreateWithFlags": 7, "cudaEventCreate": 9, "cudaEventElapsedTime": 1.5}
            results |= {"cudaStreamEndCapture": "graph", "cudaGraphInstantiate": "executable"}
            return (OK, results[name]) if name in results else (OK,)

        return call

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.count

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return OK, 13050

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, b"out of memory" if status == NO_MEMORY else b"something else"

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return OK, SimpleNamespace(name=b"Imaginary GPU\0\0", major=8, minor=9, totalGlobalMem=1 << 34)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return OK, 1 << 33, 1 << 34

    def cudaMalloc(self, n_bytes: int) -> tuple[int, int | None]:
        if n_bytes > 1 << 30:
            return NO_MEMORY, None
        block = np.zeros(n_bytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return OK, block.ctypes.data

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, n_bytes: int, kind: str, stream: int) -> tuple[int]:
        ctypes.memmove(target, source, n_bytes)
        return (OK,)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    made = FakeRuntime()
    monkeypatch.setattr(gpu_cuda_python, "load_cuda_runtime", lambda: made)
    return made


def fake_pycuda() -> Any:
    """pycuda.driver over host memory."""
    blocks: list[np.ndarray] = []

    class Block(int):
        def free(self) -> None:
            blocks.pop([b.ctypes.data for b in blocks].index(self))

    class Pinned:
        def __init__(self, n_bytes: int) -> None:
            self.memory = np.zeros(n_bytes, np.uint8)
            self.__array_interface__ = self.memory.__array_interface__
            blocks.append(self.memory)

        def free(self) -> None:
            blocks.pop(next(i for i, b in enumerate(blocks) if b is self.memory))

    def mem_alloc(n_bytes: int) -> Block:
        if n_bytes > 1 << 30:
            raise driver.Error("cuMemAlloc failed: out of memory")
        blocks.append(np.zeros(n_bytes, np.uint8))
        return Block(blocks[-1].ctypes.data)

    def device(number: int) -> Any:
        return SimpleNamespace(
            retain_primary_context=lambda: SimpleNamespace(push=lambda: None, pop=lambda: None, detach=lambda: None),
            compute_capability=lambda: (8, 9), name=lambda: "Imaginary GPU", total_memory=lambda: 1 << 34,
        )  # fmt: skip

    def event() -> Any:
        return SimpleNamespace(record=lambda s: None, synchronize=lambda: None, time_till=lambda end: 1.5)

    device.count = lambda: 1  # type: ignore[attr-defined]
    driver = SimpleNamespace(
        Error=RuntimeError, init=lambda: None, Device=device, get_driver_version=lambda: 13000, mem_alloc=mem_alloc,
        pagelocked_empty=lambda n, dtype: np.asarray(Pinned(n)), Event=event, mem_get_info=lambda: (1 << 33, 1 << 34),
        Stream=lambda flags: SimpleNamespace(handle=7, synchronize=lambda: None),
        memcpy_htod_async=lambda a, source, s: ctypes.memmove(a, source.ctypes.data, source.nbytes),
        memcpy_dtoh_async=lambda target, a, s: ctypes.memmove(target.ctypes.data, a, target.nbytes), blocks=blocks,
    )  # fmt: skip
    return driver


@pytest.fixture(params=["cuda-python", "pycuda"])
def gpu(request: pytest.FixtureRequest, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> tuple[Gpu, Any]:
    """A device through each package, and where its memory is."""
    driver = fake_pycuda()
    monkeypatch.setattr(gpu_pycuda, "load_pycuda_driver", lambda: driver)
    opened = open_gpu(request.param)
    assert opened.interface == request.param
    return opened, runtime.blocks if request.param == "cuda-python" else driver.blocks


def test_the_device_is_described(gpu: tuple[Gpu, Any]) -> None:
    facts = gpu[0].facts
    assert (facts.name, facts.compute_capability, facts.driver_cuda) == ("Imaginary GPU", "8.9", "13.0")
    assert facts.memory_bytes == 1 << 34
    assert gpu[0].free_bytes() == 1 << 33


def test_bytes_go_to_the_device_and_back_and_everything_is_freed(gpu: tuple[Gpu, Any]) -> None:
    opened, blocks = gpu
    owned = Ownership(opened)
    stream = owned.open_stream()
    assert opened.stream_address(stream) == 7
    there, back = owned.allocate_pinned(64), owned.allocate_pinned(48)
    address = owned.allocate(64)
    there[...] = np.arange(64, dtype=np.uint8)
    opened.copy_in(address, there, stream)
    opened.copy_out(back, address, stream)
    opened.synchronize(stream)
    np.testing.assert_array_equal(back, np.arange(48, dtype=np.uint8))
    assert owned.device_bytes == 64
    with owned.event() as start, owned.event() as end:
        opened.record(start, stream)
        opened.record(end, stream)
        assert opened.milliseconds_between(start, end) == 1.5
    opened.enter_thread()
    owned.close()
    assert len(blocks) == 0
    opened.close()


def test_a_cuda_error_keeps_the_message_of_cuda(gpu: tuple[Gpu, Any]) -> None:
    with pytest.raises(EnvironmentIssue, match="out of memory"):
        gpu[0].allocate(1 << 31)


def test_a_graph_is_instantiated_and_its_source_destroyed(runtime: FakeRuntime) -> None:
    opened = CudaPythonGpu()
    opened.begin_capture(7)
    graph = opened.end_capture(7)
    opened.launch(graph, 7)
    opened.close_graph(graph)
    assert runtime.calls[-6:] == [
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy",
        "cudaGraphLaunch", "cudaGraphExecDestroy",
    ]  # fmt: skip


def test_capturing_with_pycuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pycuda, "load_pycuda_driver", fake_pycuda)
    opened = open_gpu("pycuda")
    with pytest.raises(EnvironmentIssue, match=r"cannot capture CUDA graphs\. Leave --cuda-graphs out"):
        opened.begin_capture(opened.open_stream())


@pytest.mark.parametrize(
    ("count", "driver", "message"),
    [
        ((TOO_OLD, None), 0, r"There is no NVIDIA driver here.*docker run --gpus all"),
        ((TOO_OLD, None), 12020, r"driver is too old: it has CUDA 12\.2, .* needs 13\.5.*'cuda-python==12\.\*'"),
        ((NO_DEVICE, None), 13000, "There is a driver, but no NVIDIA GPU"),
        ((OK, 0), 13000, "There is a driver, but no NVIDIA GPU"),
        ((999, None), 13000, r"cannot be used: something else \(CUDA error 999\)"),
    ],
)
def test_a_machine_without_a_usable_gpu_is_refused_with_a_remedy(
    count: tuple[int, int | None], driver: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cuda_python, "load_cuda_runtime", lambda: FakeRuntime(count, driver))
    with pytest.raises(EnvironmentIssue, match=message):
        open_gpu()


@pytest.mark.parametrize(
    ("interface", "module", "message"),
    [
        ("cuda-python", "cuda.bindings", "pip install cuda-python"),
        ("pycuda", "pycuda", r"pip install pycuda; or use cuda-python.*--gpu-interface cuda-python"),
    ],
)
def test_a_missing_package_names_its_remedy(
    interface: Any, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentIssue, match=message):
        open_gpu(interface)


def test_pycuda_without_its_driver_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("pycuda")
    monkeypatch.setitem(sys.modules, "pycuda", package)
    with pytest.raises(EnvironmentIssue, match=r"pycuda does not load: .*Install the NVIDIA driver"):
        open_gpu("pycuda")


def test_an_unknown_interface_is_refused() -> None:
    with pytest.raises(UsageError, match="'opencl' is none of cuda-python, pycuda"):
        open_gpu("opencl")  # type: ignore[arg-type]


def test_every_function_of_cuda_python_that_is_called_exists() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    source = Path(gpu_cuda_python.__file__).read_text()
    used = set(re.findall(r'_call\(\s*"(\w+)"', source)) | set(re.findall(r"_runtime\.(cuda\w+)", source))
    assert len(used) > 20
    assert [name for name in sorted(used) if not hasattr(runtime, name)] == []


def test_every_method_of_tensorrt_that_is_called_exists() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from cclip_deploy.runtime.tensorrt import binding as tensorrt_binding
    from cclip_deploy.runtime.tensorrt import context as engine_context
    from cclip_deploy.runtime.tensorrt import engine_file

    source = "".join(Path(module.__file__).read_text() for module in (engine_context, engine_file, tensorrt_binding))
    owners = {
        "engine": rtx.ICudaEngine, "_context": rtx.IExecutionContext, "config": rtx.IRuntimeConfig,
        "refitter": rtx.Refitter, "parser": rtx.OnnxParserRefitter,
    }  # fmt: skip
    for variable, owner in owners.items():
        used = set(re.findall(rf"\b{variable}\.(\w+)", source)) - {"engine", "append"}
        assert used, variable
        assert [name for name in sorted(used) if not hasattr(owner, name)] == [], variable
    assert hasattr(rtx.Runtime, "deserialize_cuda_engine")
    assert hasattr(rtx.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(rtx.DynamicShapesKernelSpecializationStrategy, "EAGER")
