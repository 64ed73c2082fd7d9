"""`cclip-deploy bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table


@reports_errors
def bench(
    bundle: options.Bundle,
    checkpoint: options.Checkpoint = None,
    plain: Annotated[Path | None, typer.Option(help="A --plain bundle; one is made for the run unless given.")] = None,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too.")] = True,
    rounds: Annotated[int, typer.Option(help="Most rounds; each times every candidate once.", min=3)] = 30,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not count.", min=0)] = 2,
    budget: Annotated[float, typer.Option(help="Seconds after which no round is added.")] = 180.0,
    device: options.Device = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of every candidate.", min=1)] = 2,
    json: options.Json = False,
) -> None:
    """Time a bundle against PyTorch and the plain export, [bold]interleaved[/], with paired ratios."""
    from cclip_deploy.bundle import Bundle
    from cclip_deploy.pipeline.bench import BenchOptions, bench_bundle

    chosen = BenchOptions(checkpoint, plain, compile, device, threads, rounds, warmup, budget)
    with progress(quiet=json) as tell:
        result = bench_bundle(Bundle.open(bundle), chosen, tell)
    if json:
        print_json(result)
        return
    shown = table(f"{bundle}, {threads} threads", "candidate", "stage", "p50 ms ", "p90 ms ", "p99 ms ", "n ")
    for row in result["results"]:
        times = (f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
        shown.add_row(row["name"], row["stage"], *times, str(row["n"]))
    ratios = table("Paired ratios, baseline time / candidate time", "candidate", "against", "ratio ", "95 % interval ")
    for row in result["ratios"]:
        ratios.add_row(
            row["candidate"], row["baseline"], f"{row['ratio']:.2f} ×", f"{row['low']:.2f} to {row['high']:.2f}"
        )
    stdout.print(shown, ratios)
    for row in result["not_measured"]:
        stdout.print(f"Not measured: {row['name']}: {row['reason']}.", markup=False)
