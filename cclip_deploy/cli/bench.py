"""The command `cclip-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, si, stdout, table, yes_or_no
from cclip_deploy.common.json_file import write_json
from cclip_deploy.common.paths import check_writable

THREADS = 2
RUNTIME = options.Runtime(threads=THREADS)
BASELINES = {
    "plain": "plain export",
    "eager": "PyTorch eager",
    "eager causal": "eager, causal path",
    "fastest": "fastest in FP32",
    "defaults": "OpenVINO defaults",
}


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
    json: options.Json = False,
) -> None:
    """Time a bundle against PyTorch and the plain export in [bold]interleaved[/] rounds, with paired ratios."""
    from cclip_deploy.benchmark.plan import BenchOptions
    from cclip_deploy.benchmark.run import bench_bundle
    from cclip_deploy.bundle.bundle import Bundle

    check_writable(output)
    chosen = BenchOptions(
        checkpoint, plain, compile, runtime.device, runtime.threads or THREADS, rounds, warmup, budget,
        backend=runtime.backend, peers=peers, choice=runtime.config(),
    )  # fmt: skip
    with progress(quiet=json) as on_progress:
        result = bench_bundle(Bundle.open(bundle), chosen, on_progress)
    if output is not None:
        write_json(output, result)
    if json:
        print_json(result, "bench")
        return
    show_times(result)
    if peers:
        show_figures(result)
    else:
        show_ratios(result)
    for row in result["not_measured"]:
        stdout.print(f"Not measured: {row['name']}: {row['reason']}.", markup=False)


def show_times(result: dict[str, Any]) -> None:
    """Print each candidate's latency, precision and error relative to PyTorch."""
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
    """Print the paired latency ratios of the bundle's candidates."""
    title = "Speed-up of the bundle: baseline time / candidate time, paired"
    ratios = table(title, "candidate", "against", "ratio ", "95 % interval ")
    of_bundle = {row["name"] for row in result["results"] if row["role"] == "bundle"}
    for row in result["ratios"]:
        if row["candidate"] in of_bundle:
            ratios.add_row(row["candidate"], row["baseline"], f"{row['ratio']:.2f} ×", interval(row, ".2f"))
    stdout.print(ratios)


def show_figures(result: dict[str, Any]) -> None:
    """Print the speed-up over each baseline, then the other figures and those with a target."""
    show_speed_ups([row for row in result["figures"] if row["compared_with"] is not None])
    shown = table("Figures, measured in this run", "figure", "backend", "value ", "95 % interval ", "target ", "met")
    for row in result["figures"]:
        if row["compared_with"] is not None and row["goal"] is None:
            continue
        unit = row["unit"]
        goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {with_unit(row['goal'], unit)}"
        met = yes_or_no(row["met"])
        shown_interval = interval(row, ".3g", f" {unit}") if unit in ("×", "%") and row["n"] else ""
        shown.add_row(row["what"], _where(row), with_unit(row["value"], unit), shown_interval, goal, met)
    stdout.print(shown)
    if result["peak"] is not None:
        peak = si(2 * result["peak"]["multiply_adds_per_second"], "FLOP/s")
        stdout.print(f"{result['peak']['name']} reached {peak} in this run.", markup=False)


def show_speed_ups(rows: list[dict[str, Any]]) -> None:
    """Print speed-ups: rows are workloads, backends and precisions; columns are baselines."""
    columns = {row["compared_with"]: f"{BASELINES[row['compared_with']]} " for row in rows}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        what = row["what"].partition(", against ")[0] + " *" * bool(row["extrapolated"])
        cell = f"{with_unit(row['value'], row['unit'])}\n{interval(row, '.3g')}"
        cells.setdefault((what, _where(row)), {})[row["compared_with"]] = cell
    shown = table("Speed-up over each baseline, with 95 % interval", "bundle", "backend", *columns.values())
    for key, found in cells.items():
        shown.add_row(*key, *(found.get(column, "") for column in columns))
    stdout.print(shown)
    baselines = {row["compared_with"]: f"{row['baseline']}, {row['baseline_precision']}" for row in rows}
    for column, name in baselines.items():
        stdout.print(f"{BASELINES[column]}: {name}.", markup=False)
    if any(row["extrapolated"] for row in rows):
        stdout.print("* Baseline time: one run of the same round, times the number of prompts and images.")


def _where(row: dict[str, Any]) -> str:
    return " ".join(word for word in (row["backend"], row["precision"]) if word)


def interval(row: dict[str, Any], form: str, unit: str = "") -> str:
    """Format the interval of a ratio; if there is none, give the number of rounds."""
    return f"none: {row['n']} rounds" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}{unit}"


def with_unit(value: float, unit: str) -> str:
    """Format a figure with its unit: 4.31 ×, 92 %, 21.4 G, 1.1 GB."""
    return si(value, unit) if unit in ("", "B") else f"{value:.3g} {unit}"
