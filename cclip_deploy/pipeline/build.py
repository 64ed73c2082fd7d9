"""Build: a bundle's graphs become engines in a precision that is written into the graph and proved in the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cclip_deploy.bundle import (
    Bundle,
    EngineEntry,
    GraphEntry,
    Manifest,
    TensorSpec,
    edited_bundle,
    graph_key,
    write_manifest,
)
from cclip_deploy.errors import EnvironmentProblem, UsageError
from cclip_deploy.files import sha256_file
from cclip_deploy.runtime.engine_builder import BuiltEngine, EngineOptions, build_engine
from cclip_deploy.runtime.layer_table import Precision, check_precision
from cclip_deploy.runtime.tensorrt_binding import BindingName, load_binding

Progress = Callable[[str], None]
SERVED = ("image_encoder", "prompt_encoder", "mask_decoder")


@dataclass(frozen=True)
class BuildOptions:
    """Which engines. The maxima bound the dynamic dimensions; engines are tuned for one picture and one prompt."""

    precision: Precision = "fp16"
    backend: BindingName = "tensorrt-rtx"
    graphs: tuple[str, ...] = SERVED
    max_batch: int = 8
    max_prompts: int = 16
    workspace_bytes: int | None = None
    threads: int | None = None


def build_engines(bundle: Bundle, options: BuildOptions, on_progress: Progress = lambda _: None) -> list[EngineEntry]:
    """Make the precision's graphs, hold them to the parity limits, build engines from them, and add all to the bundle.

    Either everything is added or the bundle stays as it was.

    Raises:
        UsageError: a graph that the bundle does not have, or a precision that is not offered.
        EnvironmentProblem: the binding or the onnx package is missing.
        ParityError: a graph of this precision strays from the reference, or an engine does not run in the precision.
    """
    check_precision(options.precision)
    _check_plan(bundle, options)
    binding = load_binding(options.backend)
    with edited_bundle(bundle) as folder:
        manifest = _add_precision_graphs(bundle, options, folder, on_progress)
        entries = []
        for graph in options.graphs:
            source = manifest.graphs[graph_key(graph, options.precision)]
            on_progress(f"Building {graph} {options.precision} for {options.backend}")
            chosen = EngineOptions(_shapes(source.inputs, options), options.workspace_bytes, options.precision)
            built = build_engine(folder / source.file, chosen, binding, partial(_tell, on_progress, graph))
            entries.append(_write_engine(folder, graph, source, built, chosen))
        names = {(entry.graph, entry.precision, entry.backend) for entry in entries}
        kept = [e for e in manifest.engines if (e.graph, e.precision, e.backend) not in names]
        write_manifest(folder, manifest.model_copy(update={"engines": (*kept, *entries)}))
    return entries


def _tell(on_progress: Progress, graph: str, phase: str) -> None:
    on_progress(f"{graph}: {phase}")


def _check_plan(bundle: Bundle, options: BuildOptions) -> None:
    if not options.graphs:
        raise UsageError("No graph was named. Leave --graph out for the three that serve.")
    for graph in options.graphs:
        if bundle.graph(graph).precision != "fp32":
            raise UsageError(
                f"{graph} is a derived graph. Name the FP32 graph, {graph.split('.')[0]}, and a precision."
            )
    if len(set(options.graphs)) < len(options.graphs):
        raise UsageError(f"A graph is named twice: {', '.join(options.graphs)}. Name each once.")
    if options.max_batch < 1 or options.max_prompts < 1:
        raise UsageError("The largest batch and the largest number of prompts must be 1 or more.")


def _add_precision_graphs(bundle: Bundle, options: BuildOptions, folder: Path, on_progress: Progress) -> Manifest:
    """The FP32 graphs are the bundle's own; graphs of another precision are derived, compared, and kept beside them."""
    for name in options.graphs:
        bundle.file(bundle.graph(name).file)
    if options.precision == "fp32":
        return bundle.manifest
    added = {
        graph_key(name, options.precision): _derive(bundle, name, folder, options.precision, on_progress)
        for name in options.graphs
    }
    manifest = bundle.manifest.model_copy(update={"graphs": {**bundle.manifest.graphs, **added}})
    _compare(bundle, folder, manifest, options, on_progress)
    return manifest


def _derive(bundle: Bundle, name: str, folder: Path, precision: str, on_progress: Progress) -> GraphEntry:
    try:
        import onnx
    except ImportError as error:
        raise EnvironmentProblem(
            f"Making {precision} graphs needs onnx ({error}). Install: pip install 'cclip-deploy[export]'"
        ) from error
    from cclip_deploy.graph.describe import describe_graph, save_graph
    from cclip_deploy.graph.precision import to_fp16

    on_progress(f"Converting {name} to {precision}")
    source = bundle.graph(name)
    converted = to_fp16(onnx.load(bundle.file(source.file)))
    file = f"graphs/{graph_key(name, precision)}.onnx"
    (folder / file).unlink(missing_ok=True)
    save_graph(converted, folder / file)
    return describe_graph(converted, file, folder, source.sha256, precision)


def _compare(bundle: Bundle, folder: Path, manifest: Manifest, options: BuildOptions, on_progress: Progress) -> None:
    from cclip_deploy.evidence.parity import check_graphs, refuse_failures
    from cclip_deploy.evidence.reference import load_references
    from cclip_deploy.runtime.onnx_runtime import OnnxRuntimeBackend

    on_progress(f"Comparing the {options.precision} graphs with PyTorch's answers")
    references = load_references(bundle)
    backend = OnnxRuntimeBackend(Bundle.unsealed(folder, manifest), options.precision, "cpu", options.threads)
    refuse_failures(list(check_graphs(backend, options.graphs, references)))


def _shapes(
    inputs: Sequence[TensorSpec], options: BuildOptions
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    largest = {"batch": options.max_batch, "prompts": options.max_prompts}
    return {
        tensor.name: (
            _bind(tensor, dict.fromkeys(largest, 1)),
            _bind(tensor, dict.fromkeys(largest, 1)),
            _bind(tensor, largest),
        )
        for tensor in inputs
        if any(isinstance(side, str) for side in tensor.shape)
    }


def _bind(tensor: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[side] if isinstance(side, str) else side for side in tensor.shape)


def _write_engine(
    folder: Path, graph: str, source: GraphEntry, built: BuiltEngine, options: EngineOptions
) -> EngineEntry:
    (folder / "engines").mkdir(exist_ok=True)
    stem = f"engines/{graph}.{options.precision}.{built.binding}"
    file, layers = f"{stem}.engine", f"{stem}.layers.json"
    proof = {"asked": options.precision, "products": sorted(built.products), **built.layers.to_dict()}
    for name, content in ((file, built.engine), (layers, json.dumps(proof).encode())):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    return EngineEntry(
        graph=graph,
        backend=built.binding,
        backend_version=built.binding_version,
        precision=options.precision,  # type: ignore[arg-type]  # pydantic checks it
        file=file,
        sha256=sha256_file(folder / file),
        graph_sha256=source.sha256,
        layers=layers,
        shapes=dict(options.shapes),
        target="portable (Ampere and later)" if built.binding == "tensorrt-rtx" else "this machine's GPU",
        build_seconds=round(built.build_seconds, 3),
    )
