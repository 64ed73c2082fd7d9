"""Export a checkpoint to a bundle of ONNX graphs, after comparing every graph with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cclip_deploy.bundle.bundle import TOKENIZER, Bundle, check_output, new_bundle, write_manifest
from cclip_deploy.bundle.manifest import CheckpointOrigin, GraphEntry, Manifest, installed_versions, utc_now
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import check_writable
from cclip_deploy.common.threads import check_threads, set_torch_threads
from cclip_deploy.environment.packages import require_export_packages
from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.preprocess import Preprocessing
from cclip_deploy.model.config import InputForm
from cclip_deploy.prompts.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    import onnx

    from cclip_deploy.model.checkpoint import LoadedCheckpoint
    from cclip_deploy.parity.compare import Check

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        image_hw: height and width of the graphs; default: as trained, or 224x224 if the checkpoint does not say.
        prompt_length: tokens per prompt; default: as trained, or 32.
        plain: export one graph of the unmodified network instead of the deploy graphs.
        batch: static batch size of the plain graph; the deploy graphs have a dynamic one.
        with_masks: add the causal masks as outputs of the image encoder.
        with_confounding: add the confounding features as output of the image encoder.
        threads: CPU threads of PyTorch and ONNX Runtime; default: their own.
        replace: replace an existing bundle.
        reference_images: images for reference outputs, besides seeded inputs.
        reference_prompts: prompts for reference outputs.
    """

    image_hw: tuple[int, int] | None = None
    prompt_length: int | None = None
    plain: bool = False
    batch: int = 1
    with_masks: bool = False
    with_confounding: bool = False
    threads: int | None = None
    replace: bool = False
    reference_images: tuple[Path, ...] = ()
    reference_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A new bundle, its parity checks, and the number of checkpoint tensors that were dropped."""

    bundle: Bundle
    checks: tuple[Check, ...]
    tensors_dropped: int


def export_bundle(
    checkpoint: Path, output: Path, options: ExportOptions, command: str, on_progress: Progress = lambda _: None
) -> Exported:
    """Load a checkpoint, trace its graphs, compare them with PyTorch, and write a bundle to `output`.

    On failure nothing is left at `output`.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        UsageError: `output` exists, or an option is invalid.
        ParityError: a graph differs from PyTorch by more than the limits.
        TargetInUse: another run is writing `output`.
        EnvironmentIssue: a package is missing or the disk is full.
    """
    check_output(output, options.replace)
    check_writable(output)
    check_threads(options.threads)
    _check_options(options)
    require_export_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    set_torch_threads(options.threads)
    with new_bundle(output, options.replace) as folder:
        on_progress(f"Reading {checkpoint}")
        loaded = load_checkpoint(checkpoint)
        form = _input_form(options, loaded.form or InputForm())
        manifest = _write_graphs(loaded, options, form, command, folder, on_progress)
        manifest = _write_references(loaded, options, manifest, folder, on_progress)
        checks = _compare(folder, manifest, options.threads, on_progress)
    return Exported(Bundle.open(output), checks, len(loaded.dropped))


def _check_options(options: ExportOptions) -> None:
    _input_form(options, InputForm())
    if options.batch < 1:
        raise UsageError(f"Batch size {options.batch} is out of range. Use 1 or more.")
    if options.batch != 1 and not options.plain:
        raise UsageError("The deploy graphs have a dynamic batch size; --batch requires --plain.")
    if options.plain and (options.with_masks or options.with_confounding):
        raise UsageError("The plain graph has only one output; --with-masks and --with-confounding exclude --plain.")


def _input_form(options: ExportOptions, trained: InputForm) -> InputForm:
    """Return the requested input sizes, with those of training as default."""
    length = trained.prompt_length if options.prompt_length is None else options.prompt_length
    return InputForm(options.image_hw or trained.image_hw, length)


def trace_graphs(
    loaded: LoadedCheckpoint, options: ExportOptions, input_form: InputForm, on_progress: Progress
) -> dict[str, onnx.ModelProto]:
    """Return the graphs of a checkpoint by name: the deploy graphs, or `plain`."""
    from cclip_deploy.graph.deploy import to_deploy_form
    from cclip_deploy.graph.fuse import fuse
    from cclip_deploy.graph.trace import plan_deploy_graphs, plan_plain_graph, trace

    if options.plain:
        on_progress("Tracing plain")
        plan = plan_plain_graph(loaded.model, input_form.image_hw, input_form.prompt_length, options.batch)
        return {plan.name: trace(plan)}
    form = to_deploy_form(
        loaded.model, input_form.image_hw, input_form.prompt_length, options.with_masks, options.with_confounding
    )
    traced: dict[str, onnx.ModelProto] = {}
    for plan in plan_deploy_graphs(form, loaded.config, input_form.image_hw, input_form.prompt_length):
        on_progress(f"Tracing {plan.name}")
        traced[plan.name] = trace(plan)
    on_progress("Joining fused")
    row_decoder = traced.pop("row_decoder")
    return {**traced, "fused": fuse(traced["image_encoder"], traced["prompt_encoder"], row_decoder)}


def _write_graphs(
    loaded: LoadedCheckpoint, options: ExportOptions, form: InputForm, command: str, folder: Path, on_progress: Progress
) -> Manifest:
    from cclip_deploy.export.share_weights import share_weights
    from cclip_deploy.graph.entry import graph_entry, save_graph

    (folder / "graphs").mkdir()
    entries: dict[str, GraphEntry] = {}
    graphs = trace_graphs(loaded, options, form, on_progress)
    on_progress("Checking and writing graphs")
    for name in list(graphs):
        graph, file = graphs.pop(name), f"graphs/{name}.onnx"
        save_graph(graph, folder / file)
        if name == "fused":
            share_weights(folder / file, [folder / entry.file for entry in entries.values()])
        entries[name] = graph_entry(graph, file, folder, loaded.sha256, "fp32")
    (folder / TOKENIZER).write_text(PromptTokenizer.from_open_clip().to_json(), encoding="utf-8")
    return Manifest(
        created=utc_now(),
        command=printable(command),
        versions=installed_versions(),
        model=loaded.config.to_dict(),
        form="plain" if options.plain else "deploy",
        image_hw=form.image_hw,
        prompt_length=form.prompt_length,
        preprocessing=Preprocessing(),
        checkpoint=CheckpointOrigin(
            name=printable(loaded.path.name),
            sha256=loaded.sha256,
            layout=loaded.layout,
            tensors_dropped=len(loaded.dropped),
        ),
        graphs=entries,
    )


def _write_references(
    loaded: LoadedCheckpoint, options: ExportOptions, manifest: Manifest, folder: Path, on_progress: Progress
) -> Manifest:
    from cclip_deploy.parity.record import make_references
    from cclip_deploy.parity.reference import save_reference
    from cclip_deploy.runtime.pytorch import PyTorchBackend

    (folder / "reference").mkdir()
    pictures, prompts = options.reference_images, options.reference_prompts
    files = []
    for reference in make_references(PyTorchBackend(loaded.model), manifest, pictures, prompts, on_progress):
        files.append(f"reference/{reference.name}.npz")
        save_reference(reference, folder / files[-1])
    return manifest.model_copy(update={"references": tuple(files)})


def _compare(folder: Path, manifest: Manifest, threads: int | None, on_progress: Progress) -> tuple[Check, ...]:
    """Compare every graph with PyTorch; raise ParityError above the limits."""
    from cclip_deploy.parity.compare import check_graphs, plain_batch, refuse_failures
    from cclip_deploy.parity.reference import load_references
    from cclip_deploy.parity.stages import mask_stage_checks, stage_checks
    from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

    write_manifest(folder, manifest)
    unsealed = Bundle.unsealed(folder, manifest)  # no checksums yet
    on_progress("Comparing every graph with PyTorch")
    backend = OnnxRuntimeBackend(unsealed, "fp32", "cpu", threads)
    references = load_references(unsealed)
    checks = [*stage_checks(unsealed, references)]
    checks += check_graphs(backend, manifest.graphs, references, plain_batch(manifest))
    if manifest.form == "deploy":
        checks += mask_stage_checks(unsealed, backend, references)
    refuse_failures(checks)
    return tuple(checks)
