"""`cclip-deploy bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, si, stdout, table, write_json, yes_or_no
from cclip_deploy.common.limits import MOST_THREADS
from cclip_deploy.common.paths import check_writable

BASELINES = {
    "plain": "plain export",
    "eager": "PyTorch eager",
    "eager causal": "eager, causal path",
    "fastest": "fastest in FP32",
    "defaults": "OpenVINO defaults",
}


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
    threads: Annotated[int, typer.Option(help="CPU threads of every candidate.", min=1, max=MOST_THREADS)] = 2,
    allow_fallback: options.AllowFallback = False,
    gpu_interface: options.GpuInterface = "cuda-python",
    cuda_graphs: options.CudaGraphs = False,
    engine_cache: options.EngineCache = None,
    json: options.Json = False,
) -> None:
    """Time a bundle against PyTorch and the plain export, [bold]interleaved[/], with paired ratios."""
    from cclip_deploy.benchmark.plan import BenchOptions
    from cclip_deploy.benchmark.run import bench_bundle
    from cclip_deploy.bundle.bundle import Bundle

    check_writable(output)
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
    else:
        show_ratios(result)
    for row in result["not_measured"]:
        stdout.print(f"Not measured: {row['name']}: {row['reason']}.", markup=False)


def show_times(result: dict[str, Any]) -> None:
    """What each candidate took, what it ran in, and how far its answers are from PyTorch's."""
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


def show_ratios(result: dict[str, Any]) -> None:
    """The paired ratios of the bundle's candidates."""
    title = "Paired ratios of the bundle, baseline time / candidate time"
    ratios = table(title, "candidate", "against", "ratio ", "95 % interval ")
    ours = {row["name"] for row in result["results"] if row["role"] == "bundle"}
    for row in result["ratios"]:
        if row["candidate"] in ours:
            ratios.add_row(row["candidate"], row["baseline"], f"{row['ratio']:.2f} ×", between(row, ".2f"))
    stdout.print(ratios)


def show_figures(result: dict[str, Any]) -> None:
    """How many times as fast as each baseline; then the other figures, and those with a goal."""
    show_speed_ups([row for row in result["figures"] if row["compared_with"] is not None])
    shown = table("Figures, measured in this run", "figure", "backend", "value ", "95 % interval ", "goal ", "met")
    for row in result["figures"]:
        if row["compared_with"] is not None and row["goal"] is None:
            continue
        unit = row["unit"]
        goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {with_unit(row['goal'], unit)}"
        met = yes_or_no(row["met"])
        interval = between(row, ".3g", f" {unit}") if unit in ("×", "%") and row["n"] else ""
        shown.add_row(row["what"], _where(row), with_unit(row["value"], unit), interval, goal, met)
    stdout.print(shown)
    if result["peak"] is not None:
        peak = si(2 * result["peak"]["multiply_adds_per_second"], "FLOP/s")
        stdout.print(f"{result['peak']['name']} ran at {peak} in the same run.", markup=False)


def show_speed_ups(rows: list[dict[str, Any]]) -> None:
    """A row for each workload, backend and precision, a column for each baseline, the interval below the ratio."""
    columns = {row["compared_with"]: f"{BASELINES[row['compared_with']]} " for row in rows}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        what = row["what"].partition(", against ")[0] + " *" * bool(row["extrapolated"])
        cell = f"{with_unit(row['value'], row['unit'])}\n{between(row, '.3g')}"
        cells.setdefault((what, _where(row)), {})[row["compared_with"]] = cell
    shown = table("Times as fast as, 95 % interval", "bundle", "backend", *columns.values())
    for key, found in cells.items():
        shown.add_row(*key, *(found.get(column, "") for column in columns))
    stdout.print(shown)
    baselines = {row["compared_with"]: f"{row['baseline']}, {row['baseline_precision']}" for row in rows}
    for column, name in baselines.items():
        stdout.print(f"{BASELINES[column]}: {name}.", markup=False)
    if any(row["extrapolated"] for row in rows):
        stdout.print("* The baseline's time is one run of the same round, times the number of prompts and images.")


def _where(row: dict[str, Any]) -> str:
    return " ".join(word for word in (row["backend"], row["precision"]) if word)


def between(row: dict[str, Any], form: str, unit: str = "") -> str:
    """A ratio's interval, or why there is none."""
    return f"none: {row['n']} rounds" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}{unit}"


def with_unit(value: float, unit: str) -> str:
    """A figure with its unit: 4.31 ×, 92 %, 21.4 G, 1.1 GB."""
    return si(value, unit) if unit in ("", "B") else f"{value:.3g} {unit}"
