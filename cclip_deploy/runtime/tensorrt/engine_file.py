"""Find, check and deserialize a bundle's engine files.

An engine is executable code, so its hash, binding, version and GPU are checked before TensorRT reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import EngineEntry, EngineTarget, GraphEntry, TensorSpec
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import check_tensors
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.tensorrt.binding import (
    binding_label,
    capability_numbers,
    join_errors,
    make_logger,
    numpy_type,
)
from cclip_deploy.runtime.tensorrt.context import LoadedEngine
from cclip_deploy.runtime.tensorrt.device import GpuFacts

if TYPE_CHECKING:
    from types import ModuleType


def engines_of(bundle: Bundle, backend: str, precision: str) -> dict[str, EngineEntry]:
    """Return the engines of a bundle for one binding in one precision, by graph; raise UsageError if there are none.

    In a quantized precision, prompt encoder and mask decoder use the engines in the precision of the unquantized rest.
    """
    built = [entry for entry in bundle.manifest.engines if entry.backend == backend]
    found = {entry.graph: entry for entry in built if entry.precision == precision}
    if not found:
        have = ", ".join(f"{e.graph} {e.precision} {e.backend}" for e in bundle.manifest.engines) or "none"
        raise UsageError(
            f"{bundle.path} has no {precision} engine for {backend}; it has {have}. "
            f"Build them: {_remedy(backend, precision)}"
        )
    return {
        entry.graph: entry for entry in built if entry.precision == Precision(precision).of_graph(entry.graph)
    } | found


def check_engine(entry: EngineEntry, binding: ModuleType, facts: GpuFacts) -> None:
    """Raise EnvironmentIssue unless an engine was built for this version of the binding and for this GPU."""
    name, version = binding_label(binding)
    remedy = f"Build it again: {_remedy(entry.backend, entry.precision)}"
    if (entry.backend, entry.backend_version) != (name, version):
        raise EnvironmentIssue(
            f"{entry.file} was built with {entry.backend} {entry.backend_version}, this process has {name} {version}. "
            f"{remedy}"
        )
    if entry.runs_on is None:
        raise EnvironmentIssue(f"The bundle does not record for which GPU {entry.file} was built. {remedy}")
    if not _fits(entry.runs_on, facts):
        raise EnvironmentIssue(
            f"{entry.file} runs on {_target_label(entry.runs_on)}; this machine has a {facts.name} of compute "
            f"capability {facts.compute_capability}. {remedy}"
        )


def load_engine(bundle: Bundle, entry: EngineEntry, binding: ModuleType, facts: GpuFacts) -> LoadedEngine:
    """Check an engine and deserialize it.

    Raises:
        BundleError: the file differs from the manifest, or its inputs and outputs differ from those of its graph.
        EnvironmentIssue: it was built for another version or GPU, or TensorRT rejects it.
    """
    check_engine(entry, binding, facts)
    content = bundle.read(entry.file)
    errors: list[str] = []

    def on_message(severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            errors.append(message)

    runtime = binding.Runtime(make_logger(binding, on_message))
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EnvironmentIssue(f"{' '.join(binding_label(binding))} does not load {entry.file}: {join_errors(errors)}")
    if entry.stripped:
        _refit(bundle, entry, engine, binding, make_logger(binding, on_message), errors)
    graph = _graph_of(bundle, entry)
    check_tensors(bundle.path / entry.file, graph, *_specs(engine, graph, binding))
    return LoadedEngine(entry.graph, runtime, engine, errors)


def _graph_of(bundle: Bundle, entry: EngineEntry) -> GraphEntry:
    for graph in bundle.manifest.graphs.values():
        if graph.sha256 == entry.graph_sha256:
            return graph
    raise BundleError(
        f"{entry.file} was built from a graph that is no longer in the bundle. Build it again: "
        f"{_remedy(entry.backend, entry.precision)}"
    )


def _refit(bundle: Bundle, entry: EngineEntry, engine: Any, binding: Any, logger: Any, errors: list[str]) -> None:
    """Refit a stripped engine with the weights of its graph."""
    graph = _graph_of(bundle, entry)
    refitter = binding.Refitter(engine, logger)
    parser = binding.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_bytes(read_checked(bundle, graph)) or not refitter.refit_cuda_engine():
        raise EnvironmentIssue(
            f"{entry.file} cannot be refitted with the weights of {graph.file}. TensorRT: {join_errors(errors)}"
        )


def _specs(engine: Any, graph: GraphEntry, binding: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the inputs and outputs of an engine; "?" stands for a dynamic size."""
    ends: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == binding.TensorIOMode.INPUT
        shape = tuple("?" if side < 0 else int(side) for side in engine.get_tensor_shape(name))
        dtype = numpy_type(binding, engine.get_tensor_dtype(name)).name
        ends[is_input].append(TensorSpec(name=name, dtype=dtype, shape=shape))
    return ends[True], ends[False]


def _fits(target: EngineTarget, facts: GpuFacts) -> bool:
    present = capability_numbers(facts.compute_capability)
    fits = facts.compute_capability in target.compute_capabilities
    if target.and_later:
        fits = present >= min(capability_numbers(name) for name in target.compute_capabilities)
    return fits and target.gpu in (None, facts.name)


def _target_label(target: EngineTarget) -> str:
    capabilities = ", ".join(target.compute_capabilities) + (" or later" if target.and_later else "")
    return f"GPUs of compute capability {capabilities}" if target.gpu is None else f"a {target.gpu} ({capabilities})"


def _remedy(backend: str, precision: str) -> str:
    return Precision(precision).build_command(f"--backend {backend}")
