"""`cclip-deploy bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, si, stdout, table, write_json


@reports_errors
def bench(
    bundle: options.Bundle,
    checkpoint: options.Checkpoint = None,
    plain: Annotated[Path | None, typer.Option(help="A --plain bundle; one is made for the run unless given.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time PyTorch, ONNX Runtime and OpenVINO without this; needs --checkpoint.")
    ] = False,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too.")] = True,
    rounds: Annotated[int, typer.Option(help="Most rounds; each times every candidate once.", min=3)] = 30,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not count.", min=0)] = 2,
    budget: Annotated[float, typer.Option(help="Seconds after which no round is added to the first ten.")] = 180.0,
    backend: Annotated[
        options.BackendName | None,
        typer.Option("--backend", help="What runs the bundle: onnxruntime unless given, and openvino with --peers."),
    ] = None,
    device: options.Device = "cpu",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the JSON in this file, too.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of every candidate.", min=1)] = 2,
    allow_fallback: options.AllowFallback = False,
    gpu_interface: options.GpuInterface = "cuda-python",
    cuda_graphs: options.CudaGraphs = False,
    engine_cache: options.EngineCache = None,
    json: options.Json = False,
) -> None:
    """Time a bundle against PyTorch and the plain export, [bold]interleaved[/], with paired ratios."""
    from cclip_deploy.bundle import Bundle
    from cclip_deploy.pipeline.bench import bench_bundle
    from cclip_deploy.pipeline.bench_plan import BenchOptions

    choice = options.choice(
        backend or "onnxruntime", device, threads, allow_fallback, gpu_interface, cuda_graphs, engine_cache
    )
    chosen = BenchOptions(
        checkpoint, plain, compile, device, threads, rounds, warmup, budget, backend=backend, peers=peers, choice=choice
    )
    with progress(quiet=json) as tell:
        result = bench_bundle(Bundle.open(bundle), chosen, tell)
    if output is not None:
        write_json(output, result)
    if json:
        print_json(result)
        return
    show_times(result)
    if peers:
        show_figures(result)
    for row in result["not_measured"]:
        stdout.print(f"Not measured: {row['name']}: {row['reason']}.", markup=False)


def show_times(result: dict[str, Any]) -> None:
    """What each candidate took, and the paired ratios."""
    title = f"{result['bundle']}, {result['threads']} threads"
    columns = ("candidate", "stage", "runs in", "prompt", "p50 ms ", "p90 ms ", "n ", "error ", "Dice ")
    shown = table(title, *columns)
    for row in result["results"]:
        times = (f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms"))
        prompt = {True: "encoded", False: "cached", None: ""}[row["includes_prompt_encoding"]]
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        dice = f"{row['mask_dice']:.4f}" if row.get("mask_dice") is not None else ""
        shown.add_row(row["name"], row["stage"], row["precision"], prompt, *times, str(row["n"]), error, dice)
    stdout.print(shown)
    title = "Paired ratios of the bundle, baseline time / candidate time"
    ratios = table(title, "candidate", "against", "ratio ", "95 % interval ")
    ours = {row["name"] for row in result["results"] if row["role"] == "bundle"}
    for row in result["ratios"]:
        if row["candidate"] in ours:
            ratios.add_row(row["candidate"], row["baseline"], f"{row['ratio']:.2f} ×", between(row, ".2f"))
    stdout.print(ratios)


def show_figures(result: dict[str, Any]) -> None:
    """The figures that the project is held to, and what the baselines of some of them were."""
    shown = table("Figures, measured in this run", "figure", "backend", "value ", "95 % interval ", "goal ", "met")
    for row in result["figures"]:
        unit = row["unit"]
        goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {with_unit(row['goal'], unit)}"
        met = {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}[row["met"]]
        what = f"{row['what']} *" if row["extrapolated"] else row["what"]
        interval = between(row, ".3g", f" {unit}") if unit in ("×", "%") and row["n"] else ""
        where = " ".join(word for word in (row["backend"], row["precision"]) if word)
        shown.add_row(what, where, with_unit(row["value"], unit), interval, goal, met)
    stdout.print(shown)
    if any(row["extrapolated"] for row in result["figures"]):
        stdout.print("* The baseline's time is one run of the same round, times the number of prompts and images.")
    if result["peak"] is not None:
        peak = si(2 * result["peak"]["multiply_adds_per_second"], "FLOP/s")
        stdout.print(f"{result['peak']['name']} ran at {peak} in the same run.", markup=False)


def between(row: dict[str, Any], form: str, unit: str = "") -> str:
    """A ratio's interval, or why there is none."""
    return f"none: {row['n']} rounds" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}{unit}"


def with_unit(value: float, unit: str) -> str:
    """A figure with its unit: 4.31 ×, 92 %, 21.4 G, 1.1 GB."""
    return si(value, unit) if unit in ("", "B") else f"{value:.3g} {unit}"
