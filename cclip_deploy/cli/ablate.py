"""`cclip-deploy ablate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.limits import MOST_THREADS
from cclip_deploy.common.paths import check_writable


@reports_errors
def ablate(
    plan: Annotated[Path, typer.Argument(help="A TOML file; training/ablations/ has some.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Data set, in place of the plan's own or of its films.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder; runs/ablation-PLAN unless given. Goes on where it was."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Trainings at once, each with the recipe's threads.", min=1, max=MOST_THREADS)
    ] = 1,
    json: options.Json = False,
) -> None:
    """Does a mode of training help? [bold]Every arm of a plan, over seeds[/], with spreads and paired differences."""
    from cclip_deploy.ablation.plan import read_plan
    from cclip_deploy.ablation.report import check_report_packages, tables, to_dict, write_report
    from cclip_deploy.ablation.run import ablate as run

    check_report_packages()
    folder = output or Path("runs") / f"ablation-{plan.stem}"
    check_writable(folder)
    with progress(quiet=json) as tell:
        ablation = run(read_plan(plan, data), folder, jobs, tell)
        write_report(folder, ablation, command_line())
    if json:
        print_json(to_dict(ablation, command_line()))
        return
    for part in tables(ablation):
        shown = table(part.heading, *part.columns)
        for row in part.rows:
            shown.add_row(*row)
        stdout.print(shown)
    stdout.print(f"Report: {folder / 'ablation.md'}, {folder / 'ablation.png'}", markup=False)
