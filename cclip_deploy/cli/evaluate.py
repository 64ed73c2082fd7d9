"""`cclip-deploy evaluate`"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, picture_progress, print_json, progress, reports_errors, stdout, table
from cclip_deploy.errors import ImageError

if TYPE_CHECKING:
    from cclip_deploy.evaluation.evaluate import EvaluationResult


@reports_errors
def evaluate(
    network: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="A bundle's folder, or a checkpoint's file.")
    ],
    dataset: Annotated[Path, typer.Argument(help="The data set's folder, in any layout.")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="The rows to evaluate.")] = "test",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the report: a page, JSON, a row a prompt as CSV.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a report that is there already.")] = False,
    layout: options.DataLayout = None,
    subject: options.Subject = None,
    allow_outside: options.AllowOutside = False,
    threshold: Annotated[float | None, typer.Option(help="Probability from which a pixel counts.")] = None,
    empty_masks: Annotated[
        Literal["one", "leave-out"],
        typer.Option(help="Rows with an empty reference: Dice 1 where nothing is found, else 0; or left out of means."),
    ] = "one",
    tolerance: Annotated[float, typer.Option(help="Of the boundary Dice, in pixels of the picture.", min=0)] = 2.0,
    worst: Annotated[int, typer.Option(help="How many of the worst cases to draw.", min=0, max=100)] = 8,
    seed: Annotated[
        int, typer.Option(help="Of the bootstrap, and of the shuffled control where it draws sentences.", min=0)
    ] = 0,
    image_size: Annotated[
        str | None,
        typer.Option(help="Of a checkpoint: N or HxW, multiples of 32; as it was trained (else 224) unless given."),
    ] = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(help="Of a checkpoint: tokens before a prompt is cut; as trained (else 32).", min=3, max=77),
    ] = None,
    backend: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Of a bundle: graphs in ONNX Runtime (unless given) or OpenVINO, or the bundle's engines."),
    ] = None,
    device: options.Device = "cpu",
    precision: Annotated[Precision, typer.Option(help="Which of the bundle's graphs or engines.")] = Precision.FP32,
    threads: options.Threads = None,
    allow_fallback: options.AllowFallback = False,
    gpu_interface: options.GpuInterface = "cuda-python",
    cuda_graphs: options.CudaGraphs = False,
    engine_cache: options.EngineCache = None,
    json: options.Json = False,
) -> None:
    """Measure a network on a data set: [bold]Dice, outlines, calibration, prompt controls[/], with intervals."""
    from cclip_deploy.evaluation.evaluate import EvaluationOptions, NetworkConfig
    from cclip_deploy.evaluation.evaluate import evaluate as run
    from cclip_deploy.evaluation.report import fill_report, new_report
    from cclip_deploy.model.config import image_hw

    size = None if image_size is None else image_hw(image_size)
    runs = None
    if backend is not None or device != "cpu":
        name = backend or "onnxruntime"
        runs = options.choice(name, device, threads, allow_fallback, gpu_interface, cuda_graphs, engine_cache)
    choice = NetworkConfig(network, runs, precision, threads, size, prompt_length)
    chosen = EvaluationOptions(split, layout, subject, threshold, empty_masks, tolerance, worst, seed, allow_outside)
    report = nullcontext() if output is None else new_report(output, force)
    with report as folder, progress(json or stdout.is_terminal) as tell, picture_progress(quiet=json) as on_picture:
        result = run(choice, dataset, chosen, command_line(), tell, on_picture)
        if folder is not None:
            fill_report(folder, result)
    if json:
        print_json(result.to_dict())
    else:
        _show(result, output)
    if result.measurements.failed:
        raise ImageError(f"Some pictures could not be used: {result.describe_failures()}")


def _show(result: EvaluationResult, output: Path | None) -> None:
    from cclip_deploy.evaluation.report import control_rows, remarks, score_rows

    data = result.data
    title = (
        f"{result.network['name']} on {data.split}: {data.rows} prompts, {data.images} images, {data.patients} patients"
    )
    scores = table(title, "score", "value [95 % interval] ", "rows ")
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
