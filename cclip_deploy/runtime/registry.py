"""Backend registry and CPU fallback rules. A new backend is a module with its class and an entry in `BACKENDS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.gpu import OnnxRuntimeGpuBackend
from cclip_deploy.runtime.onnxruntime.session import Device
from cclip_deploy.runtime.openvino.backend import NOT_RUN, OpenVinoBackend
from cclip_deploy.runtime.tensorrt.engine_file import engines_of
from cclip_deploy.runtime.tensorrt.runner import GpuOptions, TensorRtBackend

BackendName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class BackendConfig:
    """Which backend runs a bundle, and how.

    Attributes:
        backend: name in `BACKENDS`.
        device: execution provider of ONNX Runtime; the other backends have one device.
        threads: CPU threads; None is the backend's default.
        gpu: settings for engines.
        engine_cache: folder for what ONNX Runtime's TensorRT providers compile.
        allow_fallback: use ONNX Runtime on the CPU if the backend is not available on this machine.
    """

    backend: BackendName = "onnxruntime"
    device: Device = "cpu"
    threads: int | None = None
    gpu: GpuOptions = field(default_factory=GpuOptions)
    engine_cache: Path | None = None
    allow_fallback: bool = False

    @property
    def runs_engines(self) -> bool:
        """Whether the backend runs a bundle's engines instead of its graphs."""
        return _backend_type(self.backend).runs_engines

    @property
    def on_gpu(self) -> bool:
        return self.runs_engines or self.device != "cpu"

    def describe(self) -> str:
        """Return a short description: "onnxruntime on cuda", "tensorrt-rtx"."""
        return self.backend if self.runs_engines else f"{self.backend} on {self.device}"


@dataclass(frozen=True)
class BackendType:
    """An entry of the registry.

    Attributes:
        label: display name.
        open: opens the backend for a bundle, a precision, a configuration and `rounds_as_written`.
        runs_engines: whether it runs a bundle's engines instead of its graphs.
        devices: values of `BackendConfig.device` that it accepts.
        not_run: returns the precisions that it cannot run with a configuration, each with the reason.
    """

    label: str
    open: Callable[[Bundle, str, BackendConfig, bool], Backend]
    runs_engines: bool = False
    devices: tuple[Device, ...] = ("cpu",)
    not_run: Callable[[BackendConfig], Mapping[str, str]] = lambda config: {}


def _open_onnxruntime(bundle: Bundle, precision: str, config: BackendConfig, rounds_as_written: bool) -> Backend:
    if config.device == "cpu":
        return OnnxRuntimeBackend(bundle, precision, "cpu", config.threads, rounds_as_written)
    return OnnxRuntimeGpuBackend(bundle, precision, config.device, config.threads, config.engine_cache)


def _not_run_by_onnxruntime(config: BackendConfig) -> Mapping[str, str]:
    if config.on_gpu or importlib.util.find_spec("onnx") is not None:
        return {}
    return {"bf16": "ONNX Runtime has no BF16 kernels for a CPU, and emulating them needs the package onnx"}


def _open_openvino(bundle: Bundle, precision: str, config: BackendConfig, rounds_as_written: bool) -> Backend:
    return OpenVinoBackend(bundle, precision, config.threads)


def _open_tensorrt(bundle: Bundle, precision: str, config: BackendConfig, rounds_as_written: bool) -> Backend:
    return TensorRtBackend(bundle, precision, config.backend, config.gpu)  # type: ignore[arg-type]  # checked by name


BACKENDS: dict[str, BackendType] = {
    "onnxruntime": BackendType(
        "ONNX Runtime", _open_onnxruntime, devices=get_args(Device), not_run=_not_run_by_onnxruntime
    ),
    "openvino": BackendType("OpenVINO", _open_openvino, not_run=lambda config: NOT_RUN),
    "tensorrt": BackendType("TensorRT", _open_tensorrt, runs_engines=True),
    "tensorrt-rtx": BackendType("TensorRT-RTX", _open_tensorrt, runs_engines=True),
}


@dataclass(frozen=True)
class OpenBackend:
    """An open backend: what was requested, what runs, and the reason if they differ."""

    backend: Backend
    requested: str
    ran: str
    fallback_reason: str | None = None

    @property
    def device(self) -> str:
        """`cpu`, `cuda` for engines, or the device of ONNX Runtime's provider."""
        return str(getattr(self.backend, "device", "cpu"))

    @property
    def arithmetic(self) -> dict[str, str] | None:
        """Type of the products in each loaded graph, if the backend can read it back, as OpenVINO does; else None."""
        return getattr(self.backend, "arithmetic", None)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form that reports contain."""
        return {
            "asked": self.requested,
            "ran": self.ran,
            "precision": self.backend.precision,
            "arithmetic": self.arithmetic,
            "fallback_reason": self.fallback_reason,
        }

    def arithmetic_notes(self, graphs: Mapping[str, str]) -> list[str]:
        """Return a sentence on the graphs whose products ran in another type than that of their precision.

        Args:
            graphs: precision of each graph by name.
        """
        other = {
            graph: ran
            for graph, ran in (self.arithmetic or {}).items()
            if graph in graphs and ran != Precision(graphs[graph]).product_type
        }
        if not other:
            return []
        listed = ", ".join(f"{graph} ({graphs[graph]}) in {ran}" for graph, ran in other.items())
        return [f"On this processor, OpenVINO computes the products of {listed}: it has no kernels of that precision."]

    def notes(self, graphs: Mapping[str, str]) -> list[str]:
        """Return sentences on a fallback and, as `arithmetic_notes`, on the arithmetic."""
        reason = self.fallback_reason
        fallback = [] if reason is None else [f"{self.ran} ran instead of {self.requested}: {reason}"]
        return fallback + self.arithmetic_notes(graphs)


def open_backend(
    config: BackendConfig, bundle: Bundle, precision: str = "fp32", rounds_as_written: bool = False
) -> Backend:
    """Open a backend for a bundle, without a fallback.

    Args:
        config: which backend, and how.
        bundle: what it runs.
        precision: of the graphs or engines.
        rounds_as_written: see `OnnxRuntimeBackend`; ignored by other backends and on GPUs.

    Raises:
        UsageError: there is no such backend, it does not run on this device, or the bundle has no engine for it.
        EnvironmentIssue: it is not installed, or cannot use the device.
    """
    found = _backend_type(config.backend)
    if config.device not in found.devices:
        raise UsageError(
            f"{found.label} does not run on the device {config.device}. Leave --device out, or use --backend "
            "onnxruntime."
        )
    return found.open(bundle, precision, config, rounds_as_written)


@contextmanager
def opened(
    config: BackendConfig, bundle: Bundle, precision: str, rounds_as_written: bool = False
) -> Iterator[OpenBackend]:
    """Open a backend, or ONNX Runtime on the CPU if this machine lacks it and `allow_fallback` is set; close it later.

    A missing engine does not cause a fallback. A GPU is tested with the smallest graph, because some missing parts are
    only found on the first run. Raises like `open_backend`.
    """
    fallback = BackendConfig(threads=config.threads)
    try:
        found = OpenBackend(_open(config, bundle, precision, rounds_as_written), config.describe(), config.describe())
    except EnvironmentIssue as error:
        if not config.allow_fallback or config.describe() == fallback.describe():
            raise
        backend = open_backend(fallback, bundle, precision, rounds_as_written)
        found = OpenBackend(backend, config.describe(), fallback.describe(), str(error))
    try:
        yield found
    finally:
        close = getattr(found.backend, "close", None)
        if close is not None:
            close()


def engine_precisions(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """Return the precisions of a bundle's engines for a backend; raise UsageError if there is no engine."""
    found = dict.fromkeys(entry.precision for entry in bundle.manifest.engines if entry.backend == backend)
    if not found:
        engines_of(bundle, backend, "fp16")  # raises
    return tuple(found)


def precisions_to_run(config: BackendConfig, bundle: Bundle) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the precisions of a bundle that a backend can run and, for each of the others, the reason.

    Raises:
        UsageError: the bundle has no engine for an engine backend.
    """
    if config.runs_engines:
        return engine_precisions(bundle, config.backend), {}
    reasons = _backend_type(config.backend).not_run(config)
    found = bundle.precisions()
    return tuple(p for p in found if p not in reasons), {p: reasons[p] for p in found if p in reasons}


def _backend_type(name: str) -> BackendType:
    if name not in BACKENDS:
        raise UsageError(f"There is no backend {name!r}. Use one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def _open(config: BackendConfig, bundle: Bundle, precision: str, rounds_as_written: bool) -> Backend:
    if config.runs_engines:
        engines_of(bundle, config.backend, precision)
    backend = open_backend(config, bundle, precision, rounds_as_written)
    if config.on_gpu:
        try:
            backend.load(_smallest(config, bundle, precision))
        except BaseException:
            getattr(backend, "close", lambda: None)()
            raise
    return backend


def _smallest(config: BackendConfig, bundle: Bundle, precision: str) -> str:
    """Return the graph with the fewest multiply-adds that the backend can load."""
    if config.runs_engines:
        graphs = set(engines_of(bundle, config.backend, precision))
    else:
        entries = bundle.manifest.graphs.items()
        graphs = {name.split(".")[0] for name, entry in entries if entry.precision == precision}
        graphs = graphs or set(bundle.chain(precision))  # raises
    return min(graphs, key=lambda graph: bundle.graph(graph).multiply_adds)
