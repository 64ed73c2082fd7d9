"""An engine file becomes an engine: found in the bundle, held against the manifest and this machine, then deserialized.

An engine is executable code, so nothing of it reaches TensorRT before its hash, its binding and version, and its GPU
have been checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import EngineEntry, EngineTarget, GraphEntry, TensorSpec
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError
from cclip_deploy.runtime.backend import check_tensors
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.tensorrt.binding import binding_label, listening_logger, numpy_type
from cclip_deploy.runtime.tensorrt.context import LoadedEngine
from cclip_deploy.runtime.tensorrt.device import GpuFacts

if TYPE_CHECKING:
    from types import ModuleType


def engines_of(bundle: Bundle, backend: str, precision: str) -> dict[str, EngineEntry]:
    """The engines of a bundle for one binding in one precision, by graph; UsageError where there is none.

    In a quantized precision, the engines of a prompt encoder and a mask decoder are those of the rest's precision.
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
        raise EnvironmentIssue(f"The bundle does not say for which GPU {entry.file} was built. {remedy}")
    if not _suits(entry.runs_on, facts):
        raise EnvironmentIssue(
            f"{entry.file} runs on {_said(entry.runs_on)}; this machine has a {facts.name} of compute capability "
            f"{facts.compute_capability}. {remedy}"
        )


def load_engine(bundle: Bundle, entry: EngineEntry, binding: ModuleType, facts: GpuFacts) -> LoadedEngine:
    """The engine in memory, checked first.

    Raises:
        BundleError: the file is not what the manifest says, or takes and gives other tensors than its graph.
        EnvironmentIssue: it was built for another version or GPU, or TensorRT does not take it.
    """
    check_engine(entry, binding, facts)
    content = bundle.read(entry.file)
    complaints: list[str] = []

    def listen(severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            complaints.append(message)

    runtime = binding.Runtime(listening_logger(binding, listen))
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        said = " | ".join(complaints[-3:]) or "nothing"
        raise EnvironmentIssue(f"{' '.join(binding_label(binding))} does not load {entry.file}. It says: {said}")
    if entry.stripped:
        _put_weights_back(bundle, entry, engine, binding, listening_logger(binding, listen), complaints)
    graph = _graph_of(bundle, entry)
    check_tensors(bundle.path / entry.file, graph, *_specs(engine, graph, binding))
    return LoadedEngine(entry.graph, runtime, engine, complaints)


def _graph_of(bundle: Bundle, entry: EngineEntry) -> GraphEntry:
    for graph in bundle.manifest.graphs.values():
        if graph.sha256 == entry.graph_sha256:
            return graph
    raise BundleError(
        f"{entry.file} was built from a graph that is no longer in the bundle. Build it again: "
        f"{_remedy(entry.backend, entry.precision)}"
    )


def _put_weights_back(
    bundle: Bundle, entry: EngineEntry, engine: Any, binding: Any, logger: Any, complaints: list[str]
) -> None:
    """Fill an engine that was built without weights from the graph that it was built from."""
    graph = _graph_of(bundle, entry)
    refitter = binding.Refitter(engine, logger)
    parser = binding.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_bytes(read_checked(bundle, graph)) or not refitter.refit_cuda_engine():
        said = " | ".join(complaints[-3:]) or "nothing"
        raise EnvironmentIssue(f"The weights of {graph.file} do not go into {entry.file}. TensorRT says: {said}")


def _specs(engine: Any, graph: GraphEntry, binding: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """An engine's inputs and outputs; a side that is -1 there is told by the graph's name for it."""
    ends: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == binding.TensorIOMode.INPUT
        shape = tuple("?" if side < 0 else int(side) for side in engine.get_tensor_shape(name))
        dtype = numpy_type(binding, engine.get_tensor_dtype(name)).name
        ends[is_input].append(TensorSpec(name=name, dtype=dtype, shape=shape))
    return ends[True], ends[False]


def _suits(target: EngineTarget, facts: GpuFacts) -> bool:
    present = _numbers(facts.compute_capability)
    fits = facts.compute_capability in target.compute_capabilities
    if target.and_later:
        fits = present >= min(_numbers(name) for name in target.compute_capabilities)
    return fits and target.gpu in (None, facts.name)


def _said(target: EngineTarget) -> str:
    capabilities = ", ".join(target.compute_capabilities) + (" or later" if target.and_later else "")
    return f"GPUs of compute capability {capabilities}" if target.gpu is None else f"a {target.gpu} ({capabilities})"


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _remedy(backend: str, precision: str) -> str:
    return Precision(precision).build_command(f"--backend {backend}")
