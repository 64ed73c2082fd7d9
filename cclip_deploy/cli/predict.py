"""`cclip-deploy predict`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import picture_progress, print_json, reports_errors, stdout, table
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.inference.explain import Explainer
    from cclip_deploy.inference.segmenter import Segmenter


@reports_errors
def predict(
    bundle: options.Bundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures or folders: PNG, JPEG, TIFF, BMP, DICOM.")],
    prompt: Annotated[list[str], typer.Option(help="What to segment; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for masks and overlays.")] = Path(
        "predictions"
    ),
    threshold: Annotated[float | None, typer.Option(help="Probability from which a pixel counts.")] = None,
    force: Annotated[bool, typer.Option(help="Replace masks that are there and are of another picture.")] = False,
    repair: options.Repair = True,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was computed of each prompt, for the next time.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Draw the causal masks and the confounding branch, a picture a mask.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --explain: the bundle's checkpoint, where its own outputs do not suffice.")
    ] = None,
    backend: options.Backend = "onnxruntime",
    device: options.Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="Which of the bundle's graphs or engines.")] = Precision.FP32,
    threads: options.Threads = None,
    allow_fallback: options.AllowFallback = False,
    gpu_interface: options.GpuInterface = "cuda-python",
    cuda_graphs: options.CudaGraphs = False,
    engine_cache: options.EngineCache = None,
    json: options.Json = False,
) -> None:
    """Segment what the prompts name: [bold]mask, probability and overlay[/] in the picture's own size."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.prompts.spelling import repair_prompts

    if checkpoint is not None and not explain:
        raise UsageError("--checkpoint is for --explain; masks come from the bundle. Give both, or neither.")
    opened = Bundle.open(bundle)
    if backend in ("onnxruntime", "openvino"):
        opened.read_ahead(precision, *(() if prompt_cache else ("prompt_encoder",)), "image_encoder", "mask_decoder")

    from cclip_deploy.inference.predict import PredictOptions, refuse_failures
    from cclip_deploy.inference.predict import predict as run
    from cclip_deploy.inference.run_report import report_run
    from cclip_deploy.inference.segmenter import Segmenter
    from cclip_deploy.runtime.registry import opened as open_choice

    prompts = repair_prompts(prompt, repair)
    choice = options.choice(backend, device, threads, allow_fallback, gpu_interface, cuda_graphs, engine_cache)
    with open_choice(choice, opened, precision) as runs, picture_progress(quiet=json) as on_picture:
        segmenter = Segmenter.of_bundle(opened, runs.backend, prompt_cache)
        explainer = _open_explainer(opened, segmenter, checkpoint) if explain else None
        chosen = PredictOptions(threshold, force, explainer)
        found = run(segmenter, images, [p.text for p in prompts], output, chosen, on_picture)
        ran = report_run(runs, opened)
    if json:
        failed = [{"image": str(path), "error": reason} for path, reason in found.failed]
        counts = found.prompt_counts.to_dict()
        print_json(
            {
                "predictions": [row.to_dict() for row in found.done],
                "failed": failed,
                "repaired_prompts": [p.to_dict() for p in prompts if p.repairs],
                "prompt_kernels": counts,
                "ran": ran.to_dict(),
            }
        )
    else:
        shown = table("Predictions", "picture", "prompt", "area ", "mean probability ", "mask")
        for row in found.done:
            numbers = (f"{row.area_share:.2%}", f"{row.mean_probability:.3f}")
            shown.add_row(row.image.name, row.prompt, *numbers, str(row.written.mask))
        stdout.print(shown)
        for repaired in (p for p in prompts if p.repairs):
            stdout.print(repaired.describe(), markup=False)
        stdout.print(found.prompt_counts.describe())
        stdout.print(ran.summary(), markup=False)
        for note in ran.notes():
            stdout.print(f"Note: {note}", markup=False)
    refuse_failures(found)


def _open_explainer(bundle: Bundle, segmenter: Segmenter, checkpoint: Path | None) -> Explainer:
    from cclip_deploy.common.plotting import require_matplotlib
    from cclip_deploy.inference.explain import open_explainer

    require_matplotlib("Drawing an explanation")
    return open_explainer(bundle, segmenter, checkpoint)
