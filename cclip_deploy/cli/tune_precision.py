"""`cclip-deploy tune-precision`"""

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
def tune_precision(
    bundle: options.Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile, a TOML file.")],
    evaluation_set: Annotated[
        list[Path], typer.Option(help="Images, or a data set's test split: half decides, half judges, by patient.")
    ],
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Images, or a data set's training split, to take ranges from.")
    ] = None,
    precision: Annotated[
        Literal["int8", "int8-fp16", "fp8", "fp8-fp16", "fp16", "bf16"], typer.Option(help="The low precision.")
    ] = "int8",
    budget_mean: Annotated[float, typer.Option(help="Least mean Dice to FP32's masks.")] = 0.99,
    budget_worst: Annotated[float, typer.Option(help="Least mean Dice of one image.")] = 0.95,
    calibration_method: Annotated[
        Literal["percentile", "min-max", "entropy"], typer.Option(help="How a range is chosen.")
    ] = "percentile",
    calibration_pictures: Annotated[int, typer.Option(help="Use at most so many of them.", min=1)] = 64,
    pictures: Annotated[int, typer.Option(help="Evaluate on at most so many, both halves together.", min=4)] = 64,
    layout: options.DataLayout = None,
    subject: options.Subject = None,
    allow_outside: options.AllowOutside = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the front too, as PNG or SVG; needs matplotlib.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Find which blocks must stay in a [bold]higher precision[/] for the masks to hold, and write a profile of it."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.bundle.precision import Precision
    from cclip_deploy.datasets.image_sets import DataSetOptions
    from cclip_deploy.quantization.calibrate import CalibrationOptions, default_cache
    from cclip_deploy.quantization.pareto_plot import draw_pareto_front
    from cclip_deploy.quantization.profile import Agreement, write_tuned_profile
    from cclip_deploy.quantization.tune import TuneOptions
    from cclip_deploy.quantization.tune import tune_precision as tune

    check_writable(output, picture)
    evaluation, data_sets = tuple(evaluation_set), DataSetOptions(layout, subject, allow_outside)
    calibrating = calibration and CalibrationOptions(
        tuple(calibration), calibration_method, limit=calibration_pictures, evaluation_set=evaluation,
        data_sets=data_sets, cache=default_cache(),
    )  # fmt: skip
    budget = Agreement(mean=budget_mean, worst=budget_worst)
    with progress(quiet=json) as tell:
        profile = tune(
            Bundle.open(bundle),
            TuneOptions(Precision(precision), evaluation, calibrating or None, budget, pictures, data_sets, threads),
            tell,
        )
    write_tuned_profile(profile, output)
    if picture:
        draw_pareto_front(profile, picture)
    if json:
        print_json(profile.model_dump(mode="json"))
        return
    _show(profile)
    stdout.print(f"{output}: cclip-deploy build-engine {bundle} --tuned {output} --calibration …", markup=False)


def _show(profile: TunedProfile) -> None:
    shown = table(
        f"{profile.precision}: Dice to FP32's masks, held-out images", "blocks kept ", "share ", "mean ", "worst ",
        "last kept", "",
    )  # fmt: skip
    for point in profile.tuned.front:
        last = point.kept[-1] if point.kept else "none"
        mark = "chosen" if point.kept == profile.keep else ""
        agreement = point.held_out
        shown.add_row(
            str(len(point.kept)), f"{point.share:.1%}", f"{agreement.mean:.4f}", f"{agreement.worst:.4f}", last, mark
        )
    stdout.print(shown)
    for source in profile.tuned.sources:
        stdout.print(f"Evaluation set: {source.describe()}", markup=False)
    stdout.print(profile.why, markup=False)
    if better := profile.tuned.cheaper_as_good_when_judged():
        stdout.print(
            f"With {len(better.kept)} blocks kept the held-out images are as good ({better.held_out.mean:.4f}, "
            f"{better.held_out.worst:.4f}): more evaluation images would tell these forms apart.",
            markup=False,
        )
