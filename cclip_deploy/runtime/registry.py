"""Backend registry: which backend runs what, and the one rule by which ONNX Runtime on the CPU may stand in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnxruntime.cpu import Device, OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.gpu import OnnxRuntimeGpuBackend
from cclip_deploy.runtime.openvino.backend import NOT_RUN, OpenVinoBackend
from cclip_deploy.runtime.tensorrt.binding import BindingName
from cclip_deploy.runtime.tensorrt.engine_file import engines_of
from cclip_deploy.runtime.tensorrt.runner import GpuOptions, TensorRtBackend

BackendName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
ENGINE_BACKENDS: tuple[BindingName, ...] = get_args(BindingName)


@dataclass(frozen=True)
class BackendConfig:
    """What is asked to run a bundle, and whether ONNX Runtime on the CPU may where this machine lacks it.

    `device` is ONNX Runtime's, `engine_cache` a folder for what its TensorRT providers compile, `gpu` for engines.
    """

    backend: BackendName = "onnxruntime"
    device: Device = "cpu"
    threads: int | None = None
    gpu: GpuOptions = field(default_factory=GpuOptions)
    engine_cache: Path | None = None
    allow_fallback: bool = False

    @property
    def runs_engines(self) -> bool:
        """Whether a bundle's engines are run, and not its graphs."""
        return self.backend in ENGINE_BACKENDS

    @property
    def on_gpu(self) -> bool:
        return self.runs_engines or self.device != "cpu"

    def asked(self) -> str:
        """As a reader would name it: "onnxruntime on cuda", "tensorrt-rtx"."""
        return self.backend if self.runs_engines else f"{self.backend} on {self.device}"


@dataclass(frozen=True)
class OpenBackend:
    """A backend, what was asked for, what runs, and why that is another."""

    backend: Backend
    asked: str
    ran: str
    why: str | None = None

    @property
    def device(self) -> str:
        """`cpu`, `cuda` for engines, or the device of ONNX Runtime's provider."""
        return str(getattr(self.backend, "device", "cpu"))

    @property
    def arithmetic(self) -> dict[str, str] | None:
        """What the products of each graph that was loaded run in, where the backend reads it back; OpenVINO does."""
        return getattr(self.backend, "arithmetic", None)

    def to_dict(self) -> dict[str, object]:
        """For every report: who reads a number has to know what computed it."""
        return {
            "asked": self.asked,
            "ran": self.ran,
            "precision": self.backend.precision,
            "arithmetic": self.arithmetic,
            "fallback_reason": self.why,
        }

    def arithmetic_notes(self, graphs: Mapping[str, str]) -> list[str]:
        """A sentence on the graphs whose products ran in another type than their precision, `graphs` by name."""
        other = {
            graph: ran
            for graph, ran in (self.arithmetic or {}).items()
            if graph in graphs and ran != Precision(graphs[graph]).product_type
        }
        if not other:
            return []
        listed = ", ".join(f"{graph} ({graphs[graph]}) in {ran}" for graph, ran in other.items())
        return [f"On this processor, OpenVINO computes the products of {listed}: it has no kernels of that precision."]

    def told(self) -> str | None:
        """The same as a sentence, where something else runs than was asked for."""
        return None if self.why is None else f"{self.ran} ran, not {self.asked} as asked: {self.why}"


def open_backend(
    name: BackendName,
    bundle: Bundle,
    precision: str = "fp32",
    device: Device = "cpu",
    threads: int | None = None,
    rounds_as_written: bool = False,
    gpu: GpuOptions | None = None,
    engine_cache: Path | None = None,
) -> Backend:
    """The backend that was asked for and no other; `rounds_as_written` is ONNX Runtime's on a CPU.

    Raises:
        UsageError: there is no such backend, or not on this device, or the bundle has no engine for it.
        EnvironmentIssue: it is not installed, or cannot use the device.
    """
    if name == "onnxruntime" and device == "cpu":
        return OnnxRuntimeBackend(bundle, precision, device, threads, rounds_as_written)
    if name == "onnxruntime":
        return OnnxRuntimeGpuBackend(bundle, precision, device, threads, engine_cache)
    if name not in get_args(BackendName):
        raise UsageError(f"Backend {name!r} is none of {', '.join(get_args(BackendName))}.")
    if device != "cpu":
        where = "on the CPU" if name == "openvino" else "where its engines do"
        raise UsageError(
            f"{'OpenVINO' if name == 'openvino' else name} runs {where}, not on {device}. Leave --device out, or use "
            "--backend onnxruntime."
        )
    if name == "openvino":
        return OpenVinoBackend(bundle, precision, threads)
    return TensorRtBackend(bundle, precision, name, gpu)


@contextmanager
def opened(
    choice: BackendConfig, bundle: Bundle, precision: str, rounds_as_written: bool = False
) -> Iterator[OpenBackend]:
    """The backend that was asked for or, if the choice allows it, ONNX Runtime on the CPU; closed at the end.

    A missing engine is no reason to fall back: it was not built, and the message says how. A GPU is tried with the
    smallest graph, because some things are found missing only then.
    """
    try:
        found = OpenBackend(_open(choice, bundle, precision, rounds_as_written), choice.asked(), choice.asked())
    except EnvironmentIssue as error:
        if not choice.allow_fallback or choice.asked() == BackendConfig().asked():
            raise
        stand_in = open_backend("onnxruntime", bundle, precision, "cpu", choice.threads, rounds_as_written)
        found = OpenBackend(stand_in, choice.asked(), BackendConfig().asked(), str(error))
    try:
        yield found
    finally:
        close = getattr(found.backend, "close", None)
        if close is not None:
            close()


def engine_precisions(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The precisions that a bundle has engines of, for one binding; UsageError where there is none."""
    found = dict.fromkeys(entry.precision for entry in bundle.manifest.engines if entry.backend == backend)
    if not found:
        engines_of(bundle, backend, "fp16")  # says what to build
    return tuple(found)


def precisions_to_run(choice: BackendConfig, bundle: Bundle) -> tuple[tuple[str, ...], dict[str, str]]:
    """The precisions of a bundle that a backend can run and, of each other one, why it cannot.

    UsageError where the bundle has no engine for an engine backend.
    """
    if choice.runs_engines:
        return engine_precisions(bundle, choice.backend), {}
    reasons = dict(NOT_RUN) if choice.backend == "openvino" else {}
    if choice.backend == "onnxruntime" and not choice.on_gpu and importlib.util.find_spec("onnx") is None:
        reasons["bf16"] = "ONNX Runtime has no BF16 kernels for a CPU, and emulating them needs the package onnx"
    have = bundle.precisions()
    return tuple(p for p in have if p not in reasons), {p: reasons[p] for p in have if p in reasons}


def _open(choice: BackendConfig, bundle: Bundle, precision: str, rounds_as_written: bool) -> Backend:
    if choice.runs_engines:
        engines_of(bundle, choice.backend, precision)
    backend = open_backend(
        choice.backend, bundle, precision, choice.device, choice.threads, rounds_as_written, choice.gpu,
        choice.engine_cache,
    )  # fmt: skip
    if choice.on_gpu:
        try:
            backend.load(_smallest(choice, bundle, precision))
        except BaseException:
            getattr(backend, "close", lambda: None)()
            raise
    return backend


def _smallest(choice: BackendConfig, bundle: Bundle, precision: str) -> str:
    if choice.runs_engines:
        graphs = set(engines_of(bundle, choice.backend, precision))
    else:
        entries = bundle.manifest.graphs.items()
        graphs = {name.split(".")[0] for name, entry in entries if entry.precision == precision}
        graphs = graphs or set(bundle.chain(precision))  # raises, and says what makes them
    return min(graphs, key=lambda graph: bundle.graph(graph).multiply_adds)
