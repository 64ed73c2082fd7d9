"""`cclip-deploy build-engine`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, si, stdout, table


@reports_errors
def build_engine(
    bundle: options.Bundle,
    fp16: Annotated[bool, typer.Option("--fp16/--fp32", help="The precision that the engine must prove.")] = True,
    backend: Annotated[Literal["tensorrt-rtx", "tensorrt"], typer.Option(help="What builds it.")] = "tensorrt-rtx",
    graph: Annotated[
        list[str] | None, typer.Option(help="Graph to build; may be repeated. The three that serve unless given.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch of pictures.", min=1)] = 8,
    max_prompts: Annotated[int, typer.Option(help="Largest number of prompts.", min=1)] = 16,
    workspace_mib: Annotated[int | None, typer.Option(help="Most scratch memory, MiB.", min=1)] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Build [bold]engines[/] into a bundle and prove from the build what precision their layers run in."""
    from cclip_deploy.bundle import Bundle
    from cclip_deploy.pipeline.build import SERVED, BuildOptions, build_engines

    chosen = BuildOptions(
        precision="fp16" if fp16 else "fp32", backend=backend, graphs=tuple(graph or SERVED), max_batch=max_batch,
        max_prompts=max_prompts, workspace_bytes=workspace_mib and workspace_mib * 2**20, threads=threads,
    )  # fmt: skip
    with progress(quiet=json) as tell:
        entries = build_engines(Bundle.open(Path(bundle)), chosen, tell)
    if json:
        print_json({"bundle": str(bundle), "engines": [entry.model_dump() for entry in entries]})
        return
    shown = table("Engines, precision proved from the build log", "engine of", "precision", "size ", "build ", "target")
    for entry in entries:
        size = (bundle / entry.file).stat().st_size
        shown.add_row(entry.graph, entry.precision, si(size, "B"), f"{entry.build_seconds:.1f} s", entry.target)
    stdout.print(shown)
    stdout.print("Not run: an engine runs on a GPU only. Its graph was compared with PyTorch on this CPU.")
