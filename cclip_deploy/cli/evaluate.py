"""The command `cclip-deploy evaluate`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, image_progress, print_json, progress, reports_errors, stdout, table
from cclip_deploy.errors import ImageError

if TYPE_CHECKING:
    from cclip_deploy.evaluation.evaluate import EvaluationResult


@reports_errors
@options.expand_groups
def evaluate(
    network: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="Bundle folder or checkpoint file.")],
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split to evaluate.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the report: HTML, JSON, CSV."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing report.")] = False,
    data_sets: options.DataSets = options.DATA_SETS,
    threshold: options.Threshold = None,
    empty_masks: Annotated[
        Literal["one", "leave-out"],
        typer.Option(
            help="Rows with an empty reference mask: 'one' gives Dice 1 for an empty prediction, else 0; 'leave-out' "
            "excludes them from means."
        ),
    ] = "one",
    tolerance: Annotated[
        float, typer.Option(help="Tolerance of the boundary Dice in pixels of the image.", min=0)
    ] = 2.0,
    worst: Annotated[int, typer.Option(help="Number of worst cases to show in the report.", min=0, max=100)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of the shuffled prompts.", min=0)] = 0,
    image_size: options.ImageSize = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens at which prompts are cut. Default: as in training, else 32.",
            min=3,
            max=77,
        ),
    ] = None,
    precision: options.Precision = Precision.FP32,
    runtime: options.Runtime = options.RUNTIME,
    json: options.Json = False,
) -> None:
    """Evaluate a network on a data set: [bold]Dice, boundaries, calibration, prompt controls[/], with intervals."""
    from cclip_deploy.evaluation.evaluate import EvaluationOptions, NetworkConfig
    from cclip_deploy.evaluation.evaluate import evaluate as run
    from cclip_deploy.evaluation.report import fill_report, new_report
    from cclip_deploy.model.config import image_hw

    size = None if image_size is None else image_hw(image_size)
    backend = None if runtime.backend is None and runtime.device == "cpu" else runtime.config()
    config = NetworkConfig(network, backend, precision, runtime.threads, size, prompt_length)
    chosen = EvaluationOptions(
        split, data_sets.options(), threshold, empty_masks, tolerance, worst, seed
    )  # fmt: skip
    report = nullcontext() if output is None else new_report(output, force)
    with report as folder, progress(json or stdout.is_terminal) as on_progress, image_progress(quiet=json) as on_image:
        result = run(config, dataset, chosen, command_line(), on_progress, on_image)
        if folder is not None:
            fill_report(folder, result)
    if json:
        print_json(result.to_dict(), "evaluate")
    else:
        _show(result, output)
    if result.measurements.failed:
        raise ImageError(f"Some images could not be read: {result.describe_failures()}")


def _show(result: EvaluationResult, output: Path | None) -> None:
    from cclip_deploy.evaluation.report import control_rows, remarks, score_rows

    data = result.data
    title = (
        f"{result.network['name']} on {data.split}: {data.rows} prompts, {data.images} images, {data.patients} patients"
    )
    scores = table(title, "metric", "value [95 % interval] ", "rows ")
    for row in score_rows(result):
        scores.add_row(*row)
    stdout.print(scores)
    controls = table(
        "Prompt controls: Dice per image", "prompt", "rows ", "true prompt ", "this prompt ", "difference "
    )
    for name, _, *numbers in control_rows(result):
        controls.add_row(name, *numbers[:4])
    stdout.print(controls)
    for warning in result.warnings():
        stdout.print(f"Warning: {warning}", style="yellow", markup=False)
    for remark in remarks(result):
        stdout.print(remark, markup=False)
    if output is not None:
        stdout.print(f"Report: {output / 'index.html'}", markup=False)
