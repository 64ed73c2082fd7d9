"""Build TensorRT engines for a bundle's graphs in one precision, check them, and add them to the bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cclip_deploy.bundle.bundle import CHAIN, Bundle, edited_bundle, write_manifest
from cclip_deploy.bundle.manifest import EngineEntry, EngineTarget, GraphEntry, TensorSpec, graph_key
from cclip_deploy.bundle.precision import Precision, parse_precision
from cclip_deploy.engines.convert import ConvertedGraphs, ConvertOptions, convert_graphs
from cclip_deploy.errors import UsageError
from cclip_deploy.graph.precision.convert import InputsAndOutputs
from cclip_deploy.quantization.agreement import check_mask_agreement, evaluation_images, write_agreement
from cclip_deploy.quantization.calibrate import CalibrationOptions, Progress
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.tensorrt.binding import BindingName, check_targets, load_binding
from cclip_deploy.runtime.tensorrt.builder import BuiltEngine, EngineOptions, build_engine
from cclip_deploy.runtime.tensorrt.device import GpuInterface
from cclip_deploy.runtime.tensorrt.open_device import open_gpu
from cclip_deploy.runtime.tensorrt.settings import EngineSettings, check_buildable, engine_target, is_rtx
from cclip_deploy.verify.engine_proof import proof_record

SERVED = CHAIN


@dataclass(frozen=True)
class BuildOptions:
    """Which engines to build, and how.

    Attributes:
        max_batch, max_prompts: upper bounds of the dynamic dimensions; kernels are tuned for the usual sizes.
        one_alone: add an optimization profile for one image and one prompt; it doubles an engine's size.
        workspace_bytes: upper limit of scratch memory; None uses the binding's default.
        calibration: required for a quantized precision.
        keep: nodes and blocks that stay in a higher precision.
        gpu_interface: package through which this machine's GPU is identified.
    """

    precision: Precision = Precision.FP16
    backend: BindingName = "tensorrt-rtx"
    graphs: tuple[str, ...] = SERVED
    max_batch: int = 8
    max_prompts: int = 16
    usual_batch: int = 1
    usual_prompts: int = 1
    one_alone: bool = False
    workspace_bytes: int | None = None
    threads: int | None = None
    calibration: CalibrationOptions | None = None
    keep: tuple[str, ...] = ()
    io: InputsAndOutputs = "fp32"
    settings: EngineSettings = field(default_factory=EngineSettings)
    gpu_interface: GpuInterface = "cuda-python"


def build_engines(bundle: Bundle, options: BuildOptions, on_progress: Progress = lambda _: None) -> list[EngineEntry]:
    """Convert the graphs to the precision, check their parity, build engines, and add everything to the bundle.

    Either everything is added or the bundle stays unchanged.

    Raises:
        UsageError: a graph that the bundle does not have, an unknown precision or one the target does not support, or
            an invalid calibration.
        DataError: a calibration image cannot be read or is also in the evaluation set.
        EnvironmentIssue: the binding or the onnx package is missing.
        ParityError: a converted graph differs too much from the reference, or an engine does not run in the precision.
    """
    parse_precision(options.precision)
    check_targets(options.precision, options.settings.compute_capabilities)
    _check_plan(bundle, options)
    binding = load_binding(options.backend)
    check_buildable(options.settings.compute_capabilities, binding)
    own_gpu = None if is_rtx(binding) else _own_gpu(options)
    wanted = ConvertOptions(
        options.precision, options.graphs, options.calibration, options.keep, options.io, options.threads
    )
    with edited_bundle(bundle) as folder:
        converted = convert_graphs(bundle, wanted, folder, on_progress)
        manifest = converted.manifest
        unsealed = Bundle.unsealed(folder, manifest, bundle.sums)
        if Precision(options.precision).is_quantized and options.calibration and options.calibration.evaluation_set:
            on_progress(f"Comparing {options.precision} masks with FP32's on the evaluation set")
            images = evaluation_images(options.calibration, on_progress)
            agreement = check_mask_agreement(unsealed, options.precision, images, options.threads)
            write_agreement(agreement, folder)
        entries = []
        for graph in options.graphs:
            source = manifest.graphs[graph_key(graph, converted.precisions[graph])]
            on_progress(f"Building {graph} {source.precision} for {options.backend}")
            chosen = _engine_options(graph, source, converted, options)
            content = read_checked(unsealed, source)
            built = build_engine(content, chosen, binding, partial(_report_phase, on_progress, graph))
            runs_on = engine_target(options.settings, binding, own_gpu)
            entries.append(_write_engine(folder, graph, source, built, chosen, runs_on))
        names = {(entry.graph, entry.precision, entry.backend) for entry in entries}
        others = [e for e in manifest.engines if (e.graph, e.precision, e.backend) not in names]
        write_manifest(folder, manifest.model_copy(update={"engines": (*others, *entries)}))
    return entries


def _report_phase(on_progress: Progress, graph: str, phase: str) -> None:
    on_progress(f"{graph}: {phase}")


def _engine_options(graph: str, source: GraphEntry, converted: ConvertedGraphs, options: BuildOptions) -> EngineOptions:
    one = _shapes(source.inputs, replace(options, max_batch=1, max_prompts=1, usual_batch=1, usual_prompts=1))
    return EngineOptions(
        _shapes(source.inputs, options),
        options.workspace_bytes,
        source.precision,
        converted.high_precision.get(graph, frozenset()),
        (one,) if options.one_alone else (),
        options.settings,
    )


def _check_plan(bundle: Bundle, options: BuildOptions) -> None:
    if not options.graphs:
        raise UsageError("No graph was named. Leave --graph out to build the three graphs that are served.")
    for graph in options.graphs:
        if bundle.graph(graph).precision != "fp32":
            raise UsageError(
                f"{graph} is a converted graph. Name the FP32 graph, {graph.split('.')[0]}, and a precision."
            )
    if len(set(options.graphs)) < len(options.graphs):
        raise UsageError(f"A graph is named twice: {', '.join(options.graphs)}. Name each once.")
    if options.max_batch < 1 or options.max_prompts < 1:
        raise UsageError("The largest batch and the largest number of prompts must be 1 or more.")
    if not (1 <= options.usual_batch <= options.max_batch and 1 <= options.usual_prompts <= options.max_prompts):
        raise UsageError("The usual batch and number of prompts must be at least 1 and at most the largest.")


def _shapes(
    inputs: Sequence[TensorSpec], options: BuildOptions
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    largest = {"batch": options.max_batch, "prompts": options.max_prompts}
    usual = {"batch": options.usual_batch, "prompts": options.usual_prompts}
    return {
        tensor.name: (
            _bind(tensor, dict.fromkeys(largest, 1)),
            _bind(tensor, usual),
            _bind(tensor, largest),
        )
        for tensor in inputs
        if any(isinstance(side, str) for side in tensor.shape)
    }


def _bind(tensor: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[side] if isinstance(side, str) else side for side in tensor.shape)


def _write_engine(
    folder: Path,
    graph: str,
    source: GraphEntry,
    built: BuiltEngine,
    options: EngineOptions,
    runs_on: EngineTarget | None,
) -> EngineEntry:
    (folder / "engines").mkdir(exist_ok=True)
    stem = f"engines/{graph}.{options.precision}.{built.binding}"
    file, layers = f"{stem}.engine", f"{stem}.layers.json"
    sha256 = hashlib.sha256(built.engine).hexdigest()
    record = proof_record(built, options.precision, sha256, source.sha256)
    for name, content in ((file, built.engine), (layers, json.dumps(record).encode())):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    return EngineEntry(
        graph=graph,
        backend=built.binding,
        backend_version=built.binding_version,
        precision=options.precision,
        file=file,
        sha256=sha256,
        graph_sha256=source.sha256,
        layers=layers,
        shapes=dict(options.shapes),
        target=_target_label(runs_on, options.settings),
        build_seconds=round(built.build_seconds, 3),
        runs_on=runs_on,
        stripped=options.settings.strip_weights,
        timing_cache_sha256=None if built.timing_cache is None else built.timing_cache.given_sha256,
    )


def _own_gpu(options: BuildOptions) -> tuple[str, str]:
    """Return name and compute capability of this machine's GPU, the target of plain TensorRT."""
    gpu = open_gpu(options.gpu_interface)
    try:
        return gpu.facts.name, gpu.facts.compute_capability
    finally:
        gpu.close()


def _target_label(target: EngineTarget | None, settings: EngineSettings) -> str:
    if target is None:
        return "unknown"
    if target.gpu is not None:
        return target.gpu
    if target.and_later or (settings.compatibility == "none" and not settings.compute_capabilities):
        return "portable (Ampere and later)"
    return f"compute capability {', '.join(target.compute_capabilities)}"
