"""Tables of a benchmark, for the command line and as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cclip_deploy.common.html_page import Section, Table, write_page
from cclip_deploy.common.numbers import si

BASELINES = {
    "plain": "plain export",
    "eager": "PyTorch eager",
    "eager causal": "eager, causal path",
    "fastest": "fastest in FP32",
    "defaults": "OpenVINO defaults",
}
Result = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def bench_sections(result: Result) -> list[Section]:
    """Return the tables of a result of `bench_bundle`: times, then speed-ups and, with `--peers`, all figures."""
    missing = tuple(f"Not measured: {row['name']}: {row['reason']}." for row in result["not_measured"])
    compared = _figure_sections(result) if "figures" in result else [_ratio_section(result)]
    return [_time_section(result), *compared, *([Section("", missing)] if missing else [])]


def bench_page(result: Result) -> str:
    """Return a result of `bench_bundle` as an HTML page."""
    height, width = result["network"]["image_hw"]
    rounds = min((row["n"] for row in result["results"]), default=0)
    lead = (
        f"{result['bundle']} ({result['network']['name']}, {height}×{width}) on {result['threads']} threads of "
        f"{result['fingerprint']['cpu']['model']}, {rounds} interleaved rounds. Ratios are paired within rounds."
    )
    return write_page("Benchmark", lead, bench_sections(result))


def _time_section(result: Result) -> Section:
    """Return each candidate's latency, precision and error relative to PyTorch."""
    rows = []
    for row in result["results"]:
        prompt = {True: "encoded", False: "cached", None: ""}[row["includes_prompt_encoding"]]
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        dice = f"{row['mask_dice']:.4f}" if row.get("mask_dice") is not None else ""
        times = (f"{row['p50_ms']:.1f}", f"{row['p90_ms']:.1f}", str(row["n"]))
        rows.append((row["name"], row["stage"], row["precision"], prompt, *times, error, dice))
    head = ("candidate", "stage", "runs in", "prompt", "p50 ms", "p90 ms", "n", "error", "Dice")
    title = f"{result['bundle']}, {result['threads']} threads"
    return Section(title, table=Table(head, tuple(rows), frozenset(range(4, 9))))


def _ratio_section(result: Result) -> Section:
    """Return the paired latency ratios of the bundle's candidates."""
    of_bundle = {row["name"] for row in result["results"] if row["role"] == "bundle"}
    rows = tuple(
        (row["candidate"], row["baseline"], f"{row['ratio']:.2f} ×", _interval(row, ".2f"))
        for row in result["ratios"]
        if row["candidate"] in of_bundle
    )
    head = ("candidate", "against", "ratio", "95 % interval")
    title = "Speed-up of the bundle: baseline time / candidate time, paired"
    return Section(title, table=Table(head, rows, frozenset({2, 3})))


def _figure_sections(result: Result) -> list[Section]:
    """Return the speed-up over each baseline, then the other figures and those with a target."""
    rows = []
    for row in result["figures"]:
        if row["compared_with"] is not None and row["goal"] is None:
            continue
        unit = row["unit"]
        goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {_with_unit(row['goal'], unit)}"
        interval = _interval(row, ".3g", f" {unit}") if unit in ("×", "%") and row["n"] else ""
        met = "" if row["met"] is None else row["met"]
        rows.append((row["what"], _where(row), _with_unit(row["value"], unit), interval, goal, met))
    head = ("figure", "backend", "value", "95 % interval", "target", "met")
    text: tuple[str, ...] = ()
    if result["peak"] is not None:
        peak = si(2 * result["peak"]["multiply_adds_per_second"], "FLOP/s")
        text = (f"{result['peak']['name']} reached {peak} in this run.",)
    figures = Section("Figures, measured in this run", text, table=Table(head, tuple(rows), frozenset({2, 3, 4})))
    return [_speed_up_section([row for row in result["figures"] if row["compared_with"] is not None]), figures]


def _speed_up_section(figures: Rows) -> Section:
    """Return speed-ups: rows are workloads, backends and precisions; columns are baselines."""
    columns = dict.fromkeys(row["compared_with"] for row in figures)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in figures:
        what = row["what"].partition(", against ")[0] + " *" * bool(row["extrapolated"])
        cell = f"{_with_unit(row['value'], row['unit'])}\n{_interval(row, '.3g')}"
        cells.setdefault((what, _where(row)), {})[row["compared_with"]] = cell
    rows = tuple((*key, *(found.get(column, "") for column in columns)) for key, found in cells.items())
    baselines = {row["compared_with"]: f"{row['baseline']}, {row['baseline_precision']}" for row in figures}
    text = [f"{BASELINES[column]}: {name}." for column, name in baselines.items()]
    if any(row["extrapolated"] for row in figures):
        text.append("* Baseline time: one run of the same round, times the number of prompts and images.")
    head = ("bundle", "backend", *(BASELINES[column] for column in columns))
    table = Table(head, rows, frozenset(range(2, len(head))))
    return Section("Speed-up over each baseline, with 95 % interval", tuple(text), table=table)


def _where(row: Mapping[str, Any]) -> str:
    return " ".join(word for word in (row["backend"], row["precision"]) if word)


def _interval(row: Mapping[str, Any], form: str, unit: str = "") -> str:
    """Format the interval of a ratio; if there is none, give the number of rounds."""
    return f"none: {row['n']} rounds" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}{unit}"


def _with_unit(value: float, unit: str) -> str:
    """Format a figure with its unit: 4.31 ×, 92 %, 21.4 G, 1.1 GB."""
    return si(value, unit) if unit in ("", "B") else f"{value:.3g} {unit}"
