"""The command `cclip-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, print_section, progress, reports_errors
from cclip_deploy.common.html_page import save_page
from cclip_deploy.common.json_file import write_json
from cclip_deploy.common.paths import check_writable

THREADS = 2
RUNTIME = options.Runtime(threads=THREADS)


@reports_errors
@options.expand_groups
def bench(
    bundle: options.Bundle,
    checkpoint: options.Checkpoint = None,
    plain: Annotated[
        Path | None, typer.Option(help="Bundle exported with --plain. Default: made for this run.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also time ONNX Runtime and OpenVINO as baselines; needs --checkpoint.",
        ),
    ] = False,
    compile: Annotated[bool, typer.Option(help="Also time torch.compile.")] = True,
    rounds: Annotated[int, typer.Option(help="Maximum number of rounds; each times every candidate once.", min=3)] = 30,
    warmup: Annotated[int, typer.Option(help="Number of warm-up rounds, which are not counted.", min=0)] = 2,
    budget: Annotated[float, typer.Option(help="Time limit in seconds, applied after the first ten rounds.")] = 180.0,
    runtime: options.Runtime = RUNTIME,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write the result to.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page to write the tables to.")] = None,
    json: options.Json = False,
) -> None:
    """Time a bundle against PyTorch and the plain export in [bold]interleaved[/] rounds, with paired ratios."""
    from cclip_deploy.benchmark.plan import BenchOptions
    from cclip_deploy.benchmark.report import bench_page, bench_sections
    from cclip_deploy.benchmark.run import bench_bundle
    from cclip_deploy.bundle.bundle import Bundle

    check_writable(output)
    check_writable(report)
    chosen = BenchOptions(
        checkpoint, plain, compile, runtime.device, runtime.threads or THREADS, rounds, warmup, budget,
        backend=runtime.backend, peers=peers, choice=runtime.config(),
    )  # fmt: skip
    with progress(quiet=json) as on_progress:
        result = bench_bundle(Bundle.open(bundle), chosen, on_progress)
    if output is not None:
        write_json(output, result)
    if report is not None:
        save_page(bench_page(result), report)
    if json:
        print_json(result, "bench")
        return
    for section in bench_sections(result):
        print_section(section)
