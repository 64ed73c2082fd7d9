"""ONNX Runtime backend on NVIDIA GPUs: CUDA, TensorRT and TensorRT-RTX providers with IO binding. Not tested on a GPU.

The TensorRT providers build engines from the bundle's graphs in the precision of the graph; no provider option sets it.
With TensorRT 10 these engines are weakly typed, so check lower precisions with `verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import GraphEntry
from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.runtime.backend import DeviceTensor, TensorsOrArrays
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.session import PROVIDERS, Device, Provider

LARGEST = {"batch": 8, "prompts": 16}


class OnnxRuntimeGpuBackend(OnnxRuntimeBackend):
    """Runs a bundle's graphs in ONNX Runtime on a GPU; features stay in device memory between two graphs."""

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        device: Device,
        threads: int | None = None,
        cache: Path | None = None,
        memory: str = "cuda",
    ) -> None:
        """Create the backend; see `OnnxRuntimeBackend`.

        Args:
            bundle: contains the graphs.
            precision: of the graphs.
            device: key of `PROVIDERS`.
            threads: CPU threads for operators that do not run on the GPU.
            cache: folder for what the TensorRT providers compile. It contains code, so others must not write to it.
                None compiles again in every process.
            memory: ONNX Runtime's name of the device memory for outputs.
        """
        super().__init__(bundle, precision, device, threads)
        self.cache = cache
        self._memory = memory

    def run(self, graph: str, inputs: TensorsOrArrays) -> dict[str, NDArray[np.float32]]:
        names, values = self._run_bound(graph, inputs, None, "cpu")
        return {name: value.numpy().astype(np.float32) for name, value in zip(names, values, strict=True)}

    def run_on_device(self, graph: str, inputs: TensorsOrArrays, names: Sequence[str]) -> dict[str, DeviceTensor]:
        found, values = self._run_bound(graph, inputs, names, self._memory)
        return {name: OrtTensor(value) for name, value in zip(found, values, strict=True) if name in names}

    def _run_bound(
        self, graph: str, inputs: TensorsOrArrays, on_device: Sequence[str] | None, memory: str
    ) -> tuple[list[str], list[Any]]:
        session = self._session(graph)
        names = [output.name for output in session.get_outputs()]
        halves = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, OrtTensor):
                binding.bind_ortvalue_input(name, value.ort_value())
            else:
                array = value if isinstance(value, np.ndarray) else value.numpy()
                binding.bind_cpu_input(name, np.ascontiguousarray(array, np.float16 if name in halves else None))
        for name in names:
            binding.bind_output(name, memory if on_device is None or name in on_device else self._memory)
        with self._guarded(graph) as options:
            binding.synchronize_inputs()
            session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        return names, binding.get_outputs()

    def _providers(self, entry: GraphEntry) -> list[Provider]:
        options = provider_options(self.device, entry, self.cache)
        # Operators that TensorRT does not support run in CUDA, not on the CPU.
        return [(PROVIDERS[self.device], options)] + (
            [(PROVIDERS["cuda"], provider_options("cuda", entry, None))] if self.device == "tensorrt" else []
        )


class OrtTensor:
    """An output in ONNX Runtime's device memory; a `DeviceTensor`."""

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.ort_value().shape())

    def ort_value(self) -> Any:
        """Return ONNX Runtime's value; raise EnvironmentIssue if it was closed."""
        if self._value is None:
            raise EnvironmentIssue("This output was freed. Compute it again.")
        return self._value

    def numpy(self) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self.ort_value().numpy().astype(np.float32)
        return array

    def wait(self) -> None:
        """Do nothing: `run_on_device` waits."""

    def close(self) -> None:
        self._value = None


def provider_options(device: Device, entry: GraphEntry, cache: Path | None) -> dict[str, str]:
    """Return an execution provider's options for a graph: shapes, no automatic precision, and caches if requested.

    The caches of a graph are in a folder named by its hash, so that they are never used for another graph.
    """
    if device == "cuda":
        return {"use_tf32": "0"}
    prefix = "trt" if device == "tensorrt" else "nv"
    options: dict[str, str] = {}
    if entry.dynamic():
        for which, sizes in (("min", dict.fromkeys(LARGEST, 1)), ("opt", dict.fromkeys(LARGEST, 1)), ("max", LARGEST)):
            options[f"{prefix}_profile_{which}_shapes"] = ",".join(
                f"{tensor.name}:{'x'.join(str(sizes.get(str(side), side)) for side in tensor.shape)}"
                for tensor in entry.inputs
            )
    folder = None if cache is None else str(cache / entry.sha256[:16])
    if device == "tensorrt":
        options |= {"trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0"}
        if folder is not None:
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
    elif folder is not None:
        options["nv_runtime_cache_path"] = folder
    return options
