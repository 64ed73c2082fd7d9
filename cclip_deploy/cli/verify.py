"""The command `cclip-deploy verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, styled, table
from cclip_deploy.errors import ParityError

if TYPE_CHECKING:
    from rich.text import Text

    from cclip_deploy.parity.compare import Check

METRICS = ("relative_error", "max_error", "mask_dice", "flipped_share")


@reports_errors
@options.expand_groups
def verify(
    bundle: options.Bundle,
    checkpoint: options.Checkpoint = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image or folder to compare on; needs --checkpoint.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to compare on; needs --checkpoint.")] = None,
    repair: options.Repair = True,
    runtime: options.Runtime = options.RUNTIME,
    json: options.Json = False,
) -> None:
    """Compare every graph of a bundle with [bold]PyTorch[/]. Exit code 4 if a parity limit is exceeded."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.prompts.spelling import repair_prompts
    from cclip_deploy.verify.verify import VerifyOptions, verify_bundle

    prompts = repair_prompts(prompt or (), repair)
    texts = tuple(p.text for p in prompts)
    chosen = VerifyOptions(checkpoint, tuple(image or ()), texts, runtime.threads, runtime.config())
    with progress(quiet=json) as on_progress:
        result = verify_bundle(Bundle.open(bundle), chosen, on_progress)
    notes = [*(p.describe() for p in prompts if p.repairs), *result.notes]
    if json:
        print_json({**result.to_dict(), "notes": notes}, "verify")
    else:
        _show(str(bundle), result.checks)
        for row in result.not_verified:
            stdout.print(f"Not verified: {row['graph']} on {row['backend']}: {row['reason']}.", markup=False)
        for note in notes:
            stdout.print(f"Note: {note}", markup=False)
    if not result.passed:
        failed = [check for check in result.checks if not check.passed]
        first = f" The first: {failed[0].describe()}." if failed else ""
        raise ParityError(
            f"{len(failed)} of {len(result.checks)} checks exceed their limit.{first} Do not use this bundle; export "
            "it again."
        )


def _show(name: str, checks: Sequence[Check]) -> None:
    """Print the worst value of each metric for every graph, the checks of stages and engines, and all failed checks."""
    stages: dict[str, list[Check]] = {}
    for c in checks:
        if c.backend == "bundle":
            stages.setdefault(c.graph, []).append(c)
    if stages:
        verdicts = ", ".join(f"{stage} {_verdict(rows)}" for stage, rows in stages.items())
        stdout.print(f"Stages before and after the graphs: {verdicts}")
    shown = table(f"{name} compared with PyTorch, worst values", "graph", "precision", *(f"{m} " for m in METRICS), "")
    outputs = [c for c in checks if c.metric in (*METRICS, "flipped_pixels")]
    for graph, precision in dict.fromkeys((c.graph, c.precision) for c in outputs):
        rows = [c for c in outputs if (c.graph, c.precision) == (graph, precision)]
        cells = (_worst([c for c in rows if c.metric == metric]) for metric in METRICS)
        shown.add_row(graph, precision, *cells, _in_color(_verdict(rows)))
    stdout.print(shown)
    for part, what in (
        ("derivation", "converted again from FP32 and compared"),
        ("layers", "compared with FP32 layer by layer"),
    ):
        if rows := [c for c in checks if c.name.endswith(f"/{part}")]:
            stdout.print(f"{len(rows)} low-precision graphs {what}: {_verdict(rows)}")
    engines = [c for c in checks if c.name.split("/")[1:2] == ["engine"]]
    for graph, precision, backend in dict.fromkeys((c.graph, c.precision, c.backend) for c in engines):
        rows = [c for c in engines if (c.graph, c.precision, c.backend) == (graph, precision, backend)]
        stdout.print(f"{backend} engine of {graph}: built from this graph, layers in {precision}: {_verdict(rows)}")
    for c in checks:
        if not c.passed:
            stdout.print(styled(c.describe(), "bold red"))


def _worst(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    pick = min if checks[0].metric == "mask_dice" else max
    return f"{pick(c.value for c in checks):.4g}"


def _verdict(checks: Sequence[Check]) -> str:
    return "ok" if all(c.passed for c in checks) else "FAILED"


def _in_color(verdict: str) -> Text:
    return styled(verdict, "green" if verdict == "ok" else "bold red")
