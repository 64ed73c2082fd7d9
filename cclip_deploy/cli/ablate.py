"""The command `cclip-deploy ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.limits import MAX_THREADS
from cclip_deploy.common.paths import check_writable


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
    json: options.Json = False,
) -> None:
    """Run an ablation: train [bold]every arm of a plan over several seeds[/] and report paired differences."""
    from cclip_deploy.ablation.plan import read_plan
    from cclip_deploy.ablation.report import check_report_packages, tables, to_dict, write_report
    from cclip_deploy.ablation.run import ablate as run

    check_report_packages()
    folder = output or Path("runs") / f"ablation-{plan.stem}"
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
    stdout.print(f"Report: {folder / 'ablation.md'}, {folder / 'ablation.png'}", markup=False)
