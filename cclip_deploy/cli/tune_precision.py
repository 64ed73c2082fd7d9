"""The command `cclip-deploy tune-precision`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.paths import check_writable

if TYPE_CHECKING:
    from cclip_deploy.quantization.profile import TunedProfile


@reports_errors
@options.expand_groups
def tune_precision(
    bundle: options.Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write, a TOML file.")],
    evaluation_set: Annotated[
        list[Path],
        typer.Option(
            help="Images, or a data set, of which the test split is used. One half of the patients selects the blocks, "
            "the other half measures the result."
        ),
    ],
    calibration: options.Calibration = options.CALIBRATION,
    precision: Annotated[
        Literal["int8", "int8-fp16", "fp8", "fp8-fp16", "fp16", "bf16"], typer.Option(help="Low precision to tune.")
    ] = "int8",
    budget_mean: Annotated[float, typer.Option(help="Minimum mean Dice against the FP32 masks.")] = 0.99,
    budget_worst: Annotated[float, typer.Option(help="Minimum mean Dice of each image.")] = 0.95,
    pictures: Annotated[int, typer.Option(help="Maximum number of evaluation images.", min=4)] = 64,
    data_sets: options.DataSets = options.DATA_SETS,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG file of the Pareto front; needs matplotlib.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Find the blocks that must run in a [bold]higher precision[/] to preserve the masks, and write a profile."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.bundle.precision import Precision
    from cclip_deploy.quantization.calibrate import default_cache
    from cclip_deploy.quantization.pareto_plot import draw_pareto_front
    from cclip_deploy.quantization.profile import Agreement, write_tuned_profile
    from cclip_deploy.quantization.tune import TuneOptions
    from cclip_deploy.quantization.tune import tune_precision as tune

    check_writable(output, picture)
    calibrating = calibration.options(evaluation_set, data_sets, cache=default_cache())
    budget = Agreement(mean=budget_mean, worst=budget_worst)
    with progress(quiet=json) as on_progress:
        profile = tune(
            Bundle.open(bundle),
            TuneOptions(
                Precision(precision), tuple(evaluation_set), calibrating, budget, pictures, data_sets.options(), threads
            ),
            on_progress,
        )
    write_tuned_profile(profile, output)
    if picture:
        draw_pareto_front(profile, picture)
    if json:
        print_json(profile.model_dump(mode="json"), "tune-precision")
        return
    _show(profile)
    stdout.print(f"{output}: cclip-deploy build-engine {bundle} --tuned {output} --calibration …", markup=False)


def _show(profile: TunedProfile) -> None:
    shown = table(
        f"{profile.precision}: Dice against FP32 masks, held-out images", "high-precision blocks ", "cost ", "mean ",
        "worst ", "last block", "",
    )  # fmt: skip
    for point in profile.tuned.front:
        last = point.kept[-1] if point.kept else "none"
        mark = "selected" if point.kept == profile.keep else ""
        agreement = point.held_out
        shown.add_row(
            str(len(point.kept)), f"{point.share:.1%}", f"{agreement.mean:.4f}", f"{agreement.worst:.4f}", last, mark
        )
    stdout.print(shown)
    for source in profile.tuned.sources:
        stdout.print(f"Evaluation set: {source.describe()}", markup=False)
    stdout.print(profile.why, markup=False)
    if better := profile.tuned.cheaper_equivalent():
        stdout.print(
            f"{len(better.kept)} high-precision blocks give the same agreement on the held-out images (mean "
            f"{better.held_out.mean:.4f}, worst {better.held_out.worst:.4f}). Use more evaluation images to separate "
            "the two.",
            markup=False,
        )
