"""The command `cclip-deploy predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import image_progress, print_json, reports_errors, stdout, table
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.inference.explain import Explainer
    from cclip_deploy.inference.segmenter import Segmenter


@reports_errors
@options.expand_groups
def predict(
    bundle: options.Bundle,
    images: Annotated[list[Path], typer.Argument(help="Images or folders of images: PNG, JPEG, TIFF, BMP or DICOM.")],
    prompt: Annotated[list[str], typer.Option(help="Description of what to segment; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder for masks and overlays.")] = Path(
        "predictions"
    ),
    threshold: options.Threshold = None,
    force: Annotated[bool, typer.Option(help="Replace existing masks of another image.")] = False,
    repair: options.Repair = True,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder that caches the encoded prompts between runs.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Plot the causal masks and the confounding branch for each mask.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="With --explain: the bundle's checkpoint, for outputs that the bundle lacks."),
    ] = None,
    precision: options.Precision = Precision.FP32,
    runtime: options.Runtime = options.RUNTIME,
    json: options.Json = False,
) -> None:
    """Segment images by text prompts: write [bold]mask, probability map and overlay[/] at the original image size."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.prompts.spelling import repair_prompts

    if checkpoint is not None and not explain:
        raise UsageError("--checkpoint is only used with --explain. Add --explain or remove --checkpoint.")
    opened = Bundle.open(bundle)
    if runtime.backend in (None, "onnxruntime", "openvino"):
        opened.read_ahead(precision, *(() if prompt_cache else ("prompt_encoder",)), "image_encoder", "mask_decoder")

    from cclip_deploy.inference.predict import PredictOptions, refuse_failures
    from cclip_deploy.inference.predict import predict as run
    from cclip_deploy.inference.run_report import report_run
    from cclip_deploy.inference.segmenter import Segmenter
    from cclip_deploy.runtime.registry import opened as open_runtime

    prompts = repair_prompts(prompt, repair)
    with open_runtime(runtime.config(), opened, precision) as runs, image_progress(quiet=json) as on_image:
        segmenter = Segmenter.of_bundle(opened, runs.backend, prompt_cache)
        explainer = _open_explainer(opened, segmenter, checkpoint) if explain else None
        chosen = PredictOptions(threshold, force, explainer)
        found = run(segmenter, images, [p.text for p in prompts], output, chosen, on_image)
        ran = report_run(runs, opened)
    if json:
        failed = [{"image": str(path), "error": reason} for path, reason in found.failed]
        print_json(
            {
                "predictions": [row.to_dict() for row in found.done],
                "failed": failed,
                "repaired_prompts": [p.to_dict() for p in prompts if p.repairs],
                "prompt_kernels": found.prompt_counts.to_dict(),
                "ran": ran.to_dict(),
            },
            "predict",
        )
    else:
        shown = table("Predictions", "image", "prompt", "area ", "mean probability ", "mask")
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

    require_matplotlib("Plotting an explanation")
    return open_explainer(bundle, segmenter, checkpoint)
