"""Fake TensorRT binding for tests: engines run a bundle's ONNX graphs in ONNX Runtime, on the streams of a FakeGpu.

It asserts what TensorRT requires of the runner: shapes within the profile, an address for every tensor, scratch memory
of the right size, existing streams.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from cclip_deploy.bundle.bundle import Bundle
from tests.bundles import copy_of, reseal
from tests.runtime.fake_gpu import FakeGpu, FakeStream

VERSION = "1.7.1.116"
TYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64}
SCRATCH = {"image_encoder": 4096, "prompt_encoder": 8192, "mask_decoder": 512}


def engine_bundle(bundle: Path, folder: Path, **changes: Any) -> Bundle:
    """Copy a bundle and add an engine entry for each served graph; the engine's bytes name the graph."""
    path = copy_of(bundle, folder)
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "engines").mkdir()
    for graph in SCRATCH:
        (path / f"engines/{graph}.engine").write_bytes(f"engine of {graph}".encode())
        (path / f"engines/{graph}.layers.json").write_text(json.dumps({"layers": [], "products": []}))
        manifest["engines"].append(
            {
                "graph": graph, "backend": "tensorrt-rtx", "backend_version": VERSION, "precision": "fp32",
                "file": f"engines/{graph}.engine", "sha256": "", "layers": f"engines/{graph}.layers.json",
                "graph_sha256": manifest["graphs"][graph]["sha256"], "shapes": {}, "target": "", "build_seconds": 1.0,
                "runs_on": {"compute_capabilities": ["8.6", "8.9"]}, **changes,
            }
        )  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    reseal(path)
    return Bundle.open(path)


class FakeEngine:
    def __init__(self, binding: FakeTensorRt, graph: str) -> None:
        self.binding = binding
        self.graph = graph
        self.session = onnxruntime.InferenceSession(
            str(binding.bundle.path / "graphs" / f"{graph}.onnx"), providers=["CPUExecutionProvider"]
        )
        self.tensors = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.input_names = [t.name for t in self.session.get_inputs()]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(binding.most)
        self.device_memory_size_v2 = SCRATCH[graph]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.input_names else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return TYPES[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [side if isinstance(side, int) else -1 for side in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        def bind(size: int) -> list[int]:
            return [size if side < 0 else side for side in self.get_tensor_shape(name)]

        return [bind(1), bind(1), bind(self.binding.most[index])]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=self.binding.strategies.append)

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.binding.contexts.append(FakeContext(self))
        return self.binding.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = self.active_optimization_profile = -1 if engine.binding.contexts else 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.profiles_taken: list[int] = []

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._stream(stream)
        self.profile = self.active_optimization_profile = index
        self.profiles_taken.append(index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.input_names if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        named: dict[str, int] = {}
        for given in self.engine.input_names:
            for side, size in zip(self.engine.tensors[given].shape, self.shapes[given], strict=True):
                if isinstance(side, str):
                    named[side] = size
        return [side if isinstance(side, int) else named[side] for side in self.engine.tensors[name].shape]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self._stream(stream)
        return self.engine.binding.is_capturable

    def execute_async_v3(self, stream: int) -> bool:
        binding, gpu = self.engine.binding, self.engine.binding.gpu
        assert self.profile >= 0, "no optimization profile"
        binding.runs.append(self.engine.graph)
        if len(binding.runs) == binding.fail_at_run:
            binding.has_failed = True
            binding.logger.log("ILogger.Severity.ERROR", "injected fault")
            return False
        assert self.scratch is not None, "no scratch memory"
        assert gpu.blocks[self.scratch[0]].nbytes == self.scratch[1] >= SCRATCH[self.engine.graph]
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        assert addresses.keys() == self.engine.tensors.keys(), "a tensor without an address"

        def compute() -> None:
            feed = {name: self._view(addresses[name], name, shapes[name]) for name in self.engine.input_names}
            names = [output.name for output in self.engine.session.get_outputs()]
            for name, value in zip(names, self.engine.session.run(names, feed), strict=True):
                self._view(addresses[name], name, value.shape)[...] = value

        self._stream(stream).put(compute)
        return True

    def _view(self, address: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name)])
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        block = self.engine.binding.gpu.blocks[address]
        assert block.nbytes >= n_bytes, f"{name} does not fit its buffer"
        return block[:n_bytes].view(dtype).reshape(shape)

    def _stream(self, number: int) -> FakeStream:
        return self.engine.binding.gpu.streams[number]


class FakeTensorRt:
    """Stands for the module tensorrt_rtx. `most` is the largest dynamic size of each profile; run number `fail_at_run`
    fails, which sets `has_failed`.
    """

    __name__ = "tensorrt_rtx"
    __version__ = VERSION

    def __init__(
        self, gpu: FakeGpu, bundle: Bundle, most: tuple[int, ...] = (4,), capturable: bool = True, fail_at_run: int = 0
    ) -> None:
        self.gpu = gpu
        self.bundle = bundle
        self.most = most
        self.is_capturable = capturable
        self.fail_at_run = fail_at_run
        self.has_failed = False
        self.contexts: list[FakeContext] = []
        self.strategies: list[str] = []
        self.runs: list[str] = []
        self.deserialized: list[bytes] = []
        self.DataType = SimpleNamespace(FLOAT="FLOAT", INT64="INT64")
        self.TensorIOMode = SimpleNamespace(INPUT="INPUT")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
        self.logger: Any = None

    class ILogger:
        def __init__(self) -> None:
            pass

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger

        def deserialize(content: bytes) -> FakeEngine | None:
            self.deserialized.append(content)
            if not content.startswith(b"engine of "):
                logger.log("ILogger.Severity.ERROR", "this is not an engine")
                return None
            return FakeEngine(self, content.decode().removeprefix("engine of "))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)
