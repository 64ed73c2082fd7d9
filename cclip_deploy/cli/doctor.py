"""The command `cclip-deploy doctor`."""

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
    deep: Annotated[bool, typer.Option("--deep", help="Also import every package, which takes seconds.")] = False,
    json: options.Json = False,
) -> None:
    """Check what this machine can run and print how to fix what is missing. Exit code 3 if no bundle can run."""
    from cclip_deploy.environment.doctor import blockers, diagnose

    checks = diagnose(deep)
    if json:
        print_json({"checks": [check.to_dict() for check in checks]}, "doctor")
    else:
        show(checks)
    if blockers(checks):
        raise typer.Exit(EnvironmentIssue.exit_code)


def show(checks: Sequence[DoctorCheck]) -> None:
    """Print a table of the checks, then the remedies, each on one line for copying."""
    from rich.text import Text

    found = table("This machine", "check", "status", "needed to", "details")
    for check in checks:
        status = Text(check.status, style=STATUS_STYLE[check.status])
        found.add_row(check.name, status, Text("\n".join(check.needed_for)), Text(check.detail))
    stdout.print(found)
    for check in checks:
        if check.remedy:
            stdout.print(Text(f"{check.name}, needed to {', '.join(check.needed_for)}:", style="bold"), soft_wrap=True)
            stdout.print(Text(f"    {check.remedy}"), soft_wrap=True)
