"""`cclip-deploy doctor`: what this machine can run, and what to type where it can't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, reports_errors, stdout, table
from cclip_deploy.errors import EnvironmentIssue

if TYPE_CHECKING:
    from cclip_deploy.environment.doctor import DoctorCheck

STATUS_STYLE = {"ok": "green", "missing": "yellow", "broken": "bold red"}


@reports_errors
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Import every package too; torch takes seconds.")] = False,
    json: options.Json = False,
) -> None:
    """Say what this machine can run, and the command that mends what it can't; exit code 3 if no bundle can run."""
    from cclip_deploy.environment.doctor import blockers, diagnose

    checks = diagnose(deep)
    if json:
        print_json([check.to_dict() for check in checks])
    else:
        show(checks)
    if blockers(checks):
        raise typer.Exit(EnvironmentIssue.exit_code)


def show(checks: Sequence[DoctorCheck]) -> None:
    """A table of what was found, then the remedies, unbroken so that they can be copied."""
    from rich.text import Text

    found = table("This machine", "check", "status", "needed to", "found")
    for check in checks:
        status = Text(check.status, style=STATUS_STYLE[check.status])
        found.add_row(check.name, status, Text("\n".join(check.needed_for)), Text(check.detail))
    stdout.print(found)
    for check in checks:
        if check.remedy:
            stdout.print(Text(f"{check.name}, needed to {', '.join(check.needed_for)}:", style="bold"), soft_wrap=True)
            stdout.print(Text(f"    {check.remedy}"), soft_wrap=True)
