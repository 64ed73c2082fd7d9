"""The command `cclip-deploy ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.limits import MAX_THREADS
from cclip_deploy.common.paths import check_writable

if TYPE_CHECKING:
    from cclip_deploy.ablation.plan import AblationPlan


@reports_errors
def ablate(
    plan: Annotated[Path, typer.Argument(help="TOML file; see training/ablations/.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Data set to use instead of the plan's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Output folder; resumes a run in it. Default: runs/ablation-PLAN."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Parallel trainings, each with the recipe's threads.", min=1, max=MAX_THREADS)
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the trainings and estimate their time; write nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Run an ablation: train [bold]every arm of a plan over several seeds[/] and report paired differences."""
    from cclip_deploy.ablation.plan import read_plan
    from cclip_deploy.ablation.report import PAGE, check_report_packages, tables, to_dict, write_report
    from cclip_deploy.ablation.run import ablate as run

    check_report_packages()
    folder = output or Path("runs") / f"ablation-{plan.stem}"
    if dry_run:
        show_estimate(read_plan(plan, data), folder, jobs, json)
        return
    check_writable(folder)
    with progress(quiet=json) as on_progress:
        ablation = run(read_plan(plan, data), folder, jobs, on_progress)
        write_report(folder, ablation, command_line())
    if json:
        print_json(to_dict(ablation, command_line()), "ablate")
        return
    for part in tables(ablation):
        shown = table(part.heading, *part.columns)
        for row in part.rows:
            shown.add_row(*row)
        stdout.print(shown)
    stdout.print(f"Report: {folder / PAGE}", markup=False)


def show_estimate(plan: AblationPlan, folder: Path, jobs: int, json: bool) -> None:
    """Print the trainings of every arm and the estimated time."""
    from cclip_deploy.ablation.estimate import estimate

    with progress(quiet=json) as on_progress:
        found = estimate(plan, folder, jobs, on_progress)
    if json:
        print_json(found.to_dict(), "ablate-estimate")
        return
    shown = table("Trainings", "arm", "to choose settings ", "seeds ", "done ", "steps ", "a step, s ")
    for arm in found.arms:
        counts = (arm.tuning, arm.seeds, arm.done, arm.steps)
        shown.add_row(arm.arm, *map(str, counts), f"{arm.step_s:.2g}")
    stdout.print(shown)
    stdout.print(found.describe(), markup=False)
