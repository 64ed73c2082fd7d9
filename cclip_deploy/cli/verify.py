"""`cclip-deploy verify`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table
from cclip_deploy.errors import ParityError


@reports_errors
def verify(
    bundle: options.Bundle,
    checkpoint: options.Checkpoint = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture or folder to compare on; needs --checkpoint.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to compare on; needs --checkpoint.")] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Compare every graph of a bundle with [bold]PyTorch[/]; exit code 4 where a limit is broken."""
    from cclip_deploy.bundle import Bundle
    from cclip_deploy.pipeline.verify import VerifyOptions, verify_bundle

    chosen = VerifyOptions(checkpoint, tuple(image or ()), tuple(prompt or ()), device, threads)
    with progress(quiet=json) as tell:
        result = verify_bundle(Bundle.open(bundle), chosen, tell)
    if json:
        print_json(result.to_dict())
    else:
        shown = table(f"{bundle} against PyTorch", "check", "precision", "backend", "metric", "value ", "limit ", "")
        for c in result.checks:
            verdict = "[green]ok[/]" if c.passed else "[bold red]FAILED[/]"
            shown.add_row(c.name, c.precision, c.backend, c.metric, f"{c.value:.3g}", f"{c.limit:.3g}", verdict)
        stdout.print(shown)
        for note in result.notes:
            stdout.print(f"Note: {note}", markup=False)
    if not result.passed:
        failed = sum(not c.passed for c in result.checks)
        raise ParityError(
            f"{failed} of {len(result.checks)} checks broke their limit. Do not use this bundle; export it again."
        )
