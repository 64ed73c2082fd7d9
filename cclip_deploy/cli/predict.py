"""The command `cclip-deploy predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import Verbosity, image_progress, print_json, reports_errors, stdout, table, verbosity
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.inference.explain import Explainer
    from cclip_deploy.inference.prediction import Predictions
    from cclip_deploy.inference.segmenter import Segmenter

MOST_ROWS = 20
"""Masks up to which the table is printed without --verbose."""


@reports_errors
@options.expand_groups
def predict(
    bundle: options.Bundle,
    images: Annotated[list[Path], typer.Argument(help="Images or folders of images: PNG, JPEG, TIFF, BMP or DICOM.")],
    prompt: Annotated[list[str], typer.Option(help="Description of what to segment; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output folder.")] = Path("predictions"),
    outputs: Annotated[
        str,
        typer.Option(
            help="What to write for each mask: mask, probability, overlay, separated by commas. Default: all.",
            show_default=False,
        ),
    ] = "mask,probability,overlay",
    index: Annotated[
        str, typer.Option(help="Formats of the run's index, separated by commas: json, csv, parquet; or none.")
    ] = "json,csv",
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
    """Segment images by text prompts: write [bold]masks and probability maps[/] at the original image size.

    Overlays are for viewing: their longest side is at most 1024 pixels. predictions.json and predictions.csv in the
    output folder list what the run wrote.
    """
    from cclip_deploy.bundle.bundle import Bundle

    if checkpoint is not None and not explain:
        raise UsageError("--checkpoint is only used with --explain. Add --explain or remove --checkpoint.")
    opened = Bundle.open(bundle)
    if runtime.backend in (None, "onnxruntime", "openvino"):
        opened.read_ahead(precision, *(() if prompt_cache else ("prompt_encoder",)), "image_encoder", "mask_decoder")

    from cclip_deploy.inference.index import index_paths
    from cclip_deploy.inference.predict import PredictOptions
    from cclip_deploy.inference.predict import predict as run
    from cclip_deploy.inference.prediction import refuse_failures
    from cclip_deploy.inference.run_report import report_run
    from cclip_deploy.inference.segmenter import Segmenter

    chosen = PredictOptions(threshold, force, None, repair, _listed(outputs), _listed(index))
    chosen.check()
    verbose = verbosity() is Verbosity.VERBOSE
    loaded = Segmenter.load(opened, runtime.config(), precision, prompt_cache=prompt_cache)
    with loaded as segmenter, image_progress(quiet=json, lines=verbose) as on_image:
        explainer = _open_explainer(opened, segmenter, checkpoint) if explain else None
        found = run(segmenter, images, prompt, output, replace(chosen, explainer=explainer), on_image)
        ran = report_run(segmenter.opened, opened)
    written = index_paths(output, chosen.index)
    if json:
        print_json({**found.to_dict(), "index": list(map(str, written)), "ran": ran.to_dict()}, "predict")
    else:
        _print_masks(found, verbose)
        stdout.print(found.prompt_counts.describe())
        stdout.print(ran.summary(), markup=False)
        for note in ran.notes():
            stdout.print(f"Note: {note}", markup=False)
        if written:
            stdout.print(f"Index: {', '.join(map(str, written))}", markup=False)
        stdout.print(found.summary())
    refuse_failures(found)


def _listed(option: str) -> tuple[str, ...]:
    """Return the parts of an option that are separated by commas; "none" has none."""
    parts = tuple(part.strip() for part in option.split(",") if part.strip())
    return () if parts == ("none",) else parts


def _print_masks(found: Predictions, verbose: bool) -> None:
    """Print a table of the masks if there are few of them, and what was repaired or may not be understood."""
    if verbose or len(found.done) <= MOST_ROWS:
        shown = table("Predictions", "image", "prompt", "area ", "mean probability ", "file")
        for row in found.done:
            numbers = (f"{row.area_share:.2%}", f"{row.mean_probability:.3f}")
            shown.add_row(str(row.image), row.prompt, *numbers, str(next(iter(row.files.values()))))
        stdout.print(shown)
    for warning in dict.fromkeys(warning for row in found.done for warning in row.warnings):
        stdout.print(warning, markup=False)


def _open_explainer(bundle: Bundle, segmenter: Segmenter, checkpoint: Path | None) -> Explainer:
    from cclip_deploy.common.plotting import require_matplotlib
    from cclip_deploy.inference.explain import open_explainer

    require_matplotlib("Plotting an explanation")
    return open_explainer(bundle, segmenter, checkpoint)
