"""The command `cclip-deploy demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, stdout, table, yes_or_no


@reports_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for data, bundle and report.")] = Path(
        "runs/demo"
    ),
    threads: options.DefaultThreads = 2,
    json: options.Json = False,
) -> None:
    """Run [bold]every stage[/] on a tiny network, from training to masks, and write a report; minutes on a CPU."""
    from cclip_deploy.demo.demo import BUNDLE, REPORT, DemoOptions, run_demo

    with progress(quiet=json) as on_progress:
        facts = run_demo(output, DemoOptions(threads=threads), command_line(), on_progress)
    if json:
        print_json(facts.to_dict(), "demo")
        return
    shown = table(f"cclip-deploy demo, {facts.total_seconds:.0f} s", "stage", "what", "value", "target", "met")
    for row in facts.rows():
        met = yes_or_no(row.met)
        shown.add_row(row.stage, row.what, row.value, row.goal, met)
    stdout.print(shown)
    stdout.print(f"Report: {output / REPORT}\nBundle: {output / BUNDLE}", markup=False)
