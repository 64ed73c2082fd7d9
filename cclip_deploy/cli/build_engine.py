"""The command `cclip-deploy build-engine`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.numbers import si
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from cclip_deploy.bundle.manifest import EngineEntry
    from cclip_deploy.quantization.calibrate import CalibrationOptions
    from cclip_deploy.quantization.record import CalibrationRecord


@reports_errors
@options.expand_groups
def build_engine(
    bundle: options.Bundle,
    fp32: Annotated[bool, typer.Option("--fp32", help="Build FP32 engines.")] = False,
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Build FP16 engines (the default); with --int8 or --fp8, for the other layers."),
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Build BF16 engines.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Build INT8 engines; needs --calibration.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Build FP8 (E4M3) engines; needs --calibration.")] = False,
    calibration: options.Calibration = options.CALIBRATION,
    evaluation_set: Annotated[
        list[Path] | None,
        typer.Option(help="Images, or a data set, whose test split is used, to compare masks on; never calibrated on."),
    ] = None,
    evaluation_pictures: Annotated[int, typer.Option(help="Maximum number of evaluation images.", min=1)] = 64,
    data_sets: options.DataSets = options.DATA_SETS,
    allow_few: Annotated[bool, typer.Option(help="Allow calibration with fewer than 8 images.")] = False,
    calibration_cache: Annotated[
        bool, typer.Option(help="Cache calibration ranges between runs, as by default.", show_default=False)
    ] = True,
    tuned: Annotated[
        Path | None,
        typer.Option(help="Profile of tune-precision: precision, high-precision blocks, calibration method."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Node or block to run in the higher precision, such as tower.layer1.")
    ] = None,
    io: Annotated[Literal["fp32", "fp16"], typer.Option(help="Type of the float inputs and outputs.")] = "fp32",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability to build for, such as 8.9; may be repeated; tensorrt-rtx only."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Build profile that sets all but the calibration; see engines/profiles/.")
    ] = None,
    backend: Annotated[Literal["tensorrt-rtx", "tensorrt"], typer.Option(help="Builder.")] = "tensorrt-rtx",
    graph: Annotated[
        list[str] | None, typer.Option(help="Graph to build; may be repeated. Default: both encoders and the decoder.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Maximum number of images in a batch.", min=1)] = 8,
    max_prompts: Annotated[int, typer.Option(help="Maximum number of prompts in a batch.", min=1)] = 16,
    workspace_mib: Annotated[int | None, typer.Option(help="Workspace limit of the builder in MiB.", min=1)] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Build TensorRT [bold]engines[/] into a bundle and verify the precision of their layers from the build log."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
    from cclip_deploy.engines.profile import read_profile
    from cclip_deploy.quantization.calibrate import default_cache
    from cclip_deploy.runtime.tensorrt.settings import EngineSettings

    check_writable(Path(bundle).resolve().parent)
    requested = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    if evaluation_set and not calibration.calibration:
        raise UsageError("--evaluation-set needs --calibration, the images that the engines are calibrated on.")
    calibrating = calibration.options(
        evaluation_set, data_sets, evaluation_limit=evaluation_pictures, allow_few=allow_few,
        cache=default_cache() if calibration_cache else None,
    )  # fmt: skip
    precision, kept = _precision(requested), tuple(keep or ())
    if tuned is not None:
        precision, kept, calibrating = _with_tuned_profile(Path(bundle), tuned, requested, kept, calibrating)
    chosen = BuildOptions(
        precision=precision, backend=backend, graphs=tuple(graph or SERVED), max_batch=max_batch,
        max_prompts=max_prompts, workspace_bytes=workspace_mib and workspace_mib * 2**20, threads=threads,
        calibration=calibrating, keep=kept, io=io,
        settings=EngineSettings(compute_capabilities=tuple(compute_capability or ())),
    )  # fmt: skip
    if profile is not None:
        if tuned or graph or keep or compute_capability or any(requested.values()):
            raise UsageError(
                "--profile sets the precision, the graphs and the target. Remove the options that set them."
            )
        chosen = read_profile(profile).build_options(threads=threads, calibration=calibrating)
        precision = chosen.precision
    with progress(quiet=json) as on_progress:
        entries = build_engines(Bundle.open(Path(bundle)), chosen, on_progress)
    agreement = _agreement(bundle, precision) if evaluation_set else None
    record = _calibration_record(bundle, precision) if calibrating else None
    if json:
        engines = [entry.model_dump() for entry in entries]
        facts = {"bundle": str(bundle), "engines": engines, "mask_agreement": agreement}
        print_json({**facts, "calibration": record and record.facts()}, "build-engine")
        return
    _show(bundle, entries)
    for line in record.describe() if record else ():
        stdout.print(line, markup=False)
    if agreement:
        stdout.print(
            f"{precision} masks compared with FP32, {agreement['masks']} masks of {agreement['pictures']} images "
            f"outside the calibration set: mean Dice {agreement['mean']:.4f}, worst image {agreement['worst']:.4f}"
        )
        if agreement["cut_prompts"]:
            stdout.print(f"{agreement['cut_prompts']} prompts were cut to the bundle's prompt length.")
    elif calibrating is not None:
        stdout.print("Masks were not compared. To compare them, give images with --evaluation-set.")
    stdout.print(
        "The engines were not run, because that needs a GPU. Their graphs were compared with PyTorch on the CPU."
    )


def _precision(requested: dict[str, bool]) -> Precision:
    """Return the precision that the flags select together; FP16 by default."""
    name = "-".join(kind for kind in ("fp32", "bf16", "int8", "fp8", "fp16") if requested[kind]) or "fp16"
    for precision in Precision:
        if precision == name:
            return precision
    raise UsageError(
        f"--{name.replace('-', ' --')} cannot be combined. Give one of them, or --fp16 with --int8 or --fp8."
    )


def _with_tuned_profile(
    bundle: Path,
    path: Path,
    requested: dict[str, bool],
    keep: tuple[str, ...],
    calibration: CalibrationOptions | None,
) -> tuple[Precision, tuple[str, ...], CalibrationOptions | None]:
    """Return the precision, the high-precision blocks and the calibration of a tuned profile.

    Raises:
        UsageError: the options contradict the profile.
    """
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.quantization.profile import read_tuned_profile

    profile = read_tuned_profile(path)
    profile.check_bundle(Bundle.open(bundle))
    if keep or (any(requested.values()) and _precision(requested) != profile.precision):
        raise UsageError(
            f"{path} sets the precision ({profile.precision}) and the high-precision blocks. Remove the precision "
            "options and --keep."
        )
    return profile.precision, profile.keep, profile.calibration_options(calibration)


def _calibration_record(path: Path, precision: Precision) -> CalibrationRecord:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.quantization.record import read_record

    bundle = Bundle.open(path)
    graphs = bundle.manifest.graphs.values()
    return next(read_record(bundle, graph) for graph in graphs if graph.precision == precision and graph.calibration)


def _agreement(bundle: Path, precision: str) -> dict[str, Any]:
    from cclip_deploy.quantization.agreement import report_name

    found: dict[str, Any] = jsonlib.loads((bundle / report_name(precision)).read_bytes())
    return found


def _show(bundle: Path, entries: Sequence[EngineEntry]) -> None:
    shown = table("Engines, precision verified from the build log", "graph", "precision", "size ", "build ", "target")
    for entry in entries:
        size = (bundle / entry.file).stat().st_size
        shown.add_row(entry.graph, entry.precision, si(size, "B"), f"{entry.build_seconds:.1f} s", entry.target)
    stdout.print(shown)
