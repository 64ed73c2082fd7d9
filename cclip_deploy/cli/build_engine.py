"""`cclip-deploy build-engine`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, si, stdout, table
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from cclip_deploy.bundle.manifest import EngineEntry
    from cclip_deploy.quantization.calibrate import CalibrationOptions
    from cclip_deploy.quantization.record import CalibrationRecord


@reports_errors
def build_engine(
    bundle: options.Bundle,
    fp32: Annotated[bool, typer.Option("--fp32", help="FP32 engines.")] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="FP16 engines, the default; beside --int8 or --fp8, what the rest runs in.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="BF16 engines.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 engines; needs --calibration.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 (E4M3) engines; needs --calibration.")] = False,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Images, or a data set's training split, to take ranges from.")
    ] = None,
    calibration_method: Annotated[
        Literal["percentile", "min-max", "entropy"], typer.Option(help="How a range is chosen.")
    ] = "percentile",
    calibration_pictures: Annotated[int, typer.Option(help="Use at most so many of them.", min=1)] = 64,
    evaluation_set: Annotated[
        list[Path] | None,
        typer.Option(help="Images, or a data set's test split: kept apart, and the masks judged on them."),
    ] = None,
    evaluation_pictures: Annotated[int, typer.Option(help="Judge the masks on at most so many.", min=1)] = 64,
    layout: options.DataLayout = None,
    subject: options.Subject = None,
    allow_outside: options.AllowOutside = False,
    allow_few: Annotated[bool, typer.Option(help="Calibrate on fewer than 8 images.")] = False,
    calibration_cache: Annotated[
        bool, typer.Option("--calibration-cache/--no-calibration-cache", help="Keep ranges between runs.")
    ] = True,
    tuned: Annotated[
        Path | None, typer.Option(help="What tune-precision wrote: precision, blocks kept, calibration method.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Node or block, such as tower.layer1, kept in the higher precision.")
    ] = None,
    io: Annotated[Literal["fp32", "fp16"], typer.Option(help="Type of float inputs and outputs.")] = "fp32",
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU to build for, such as 8.9; may be repeated; tensorrt-rtx only.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Take everything but the calibration from this file, as in engines/profiles/.")
    ] = None,
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
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.datasets.image_sets import DataSetOptions
    from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
    from cclip_deploy.engines.profile import read_profile
    from cclip_deploy.quantization.calibrate import CalibrationOptions, default_cache
    from cclip_deploy.runtime.tensorrt.settings import EngineSettings

    check_writable(Path(bundle).resolve().parent)
    asked = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    if evaluation_set and not calibration:
        raise UsageError("--evaluation-set is compared with --calibration DIR, which was not given.")
    calibrating = CalibrationOptions(
        tuple(calibration), calibration_method, limit=calibration_pictures, evaluation_set=tuple(evaluation_set or ()),
        evaluation_limit=evaluation_pictures, data_sets=DataSetOptions(layout, subject, allow_outside),
        allow_few=allow_few, cache=default_cache() if calibration_cache else None,
    ) if calibration else None  # fmt: skip
    precision, kept = _precision(asked), tuple(keep or ())
    if tuned is not None:
        precision, kept, calibrating = _profiled(Path(bundle), tuned, asked, kept, calibrating)
    chosen = BuildOptions(
        precision=precision, backend=backend, graphs=tuple(graph or SERVED), max_batch=max_batch,
        max_prompts=max_prompts, workspace_bytes=workspace_mib and workspace_mib * 2**20, threads=threads,
        calibration=calibrating, keep=kept, io=io,
        settings=EngineSettings(compute_capabilities=tuple(compute_capability or ())),
    )  # fmt: skip
    if profile is not None:
        if tuned or graph or keep or compute_capability or any(asked.values()):
            raise UsageError("--profile names the precision, the graphs and the target: give it alone.")
        chosen = read_profile(profile).build_options(threads=threads, calibration=calibrating)
        precision = chosen.precision
    with progress(quiet=json) as tell:
        entries = build_engines(Bundle.open(Path(bundle)), chosen, tell)
    agreement = _agreement(bundle, precision) if evaluation_set else None
    record = _calibration_record(bundle, precision) if calibrating else None
    if json:
        engines = [entry.model_dump() for entry in entries]
        print_json({
            "bundle": str(bundle), "engines": engines, "mask_agreement": agreement,
            "calibration": record and record.facts(),
        })  # fmt: skip
        return
    _show(bundle, entries)
    for line in record.describe() if record else ():
        stdout.print(line, markup=False)
    if agreement:
        stdout.print(
            f"Masks in {precision} against FP32, {agreement['masks']} on {agreement['pictures']} images that were "
            f"not calibrated on: mean Dice {agreement['mean']:.4f}, worst image {agreement['worst']:.4f}"
        )
        if agreement["cut_prompts"]:
            stdout.print(f"{agreement['cut_prompts']} of their prompts were longer than the bundle takes and were cut.")
    elif calibrating is not None:
        stdout.print("Masks not judged: name images that were not calibrated on with --evaluation-set.")
    stdout.print("Not run: an engine runs on a GPU only. Its graph was compared with PyTorch on this CPU.")


def _precision(asked: dict[str, bool]) -> Precision:
    """The one precision that the flags name together; FP16 where none is given."""
    name = "-".join(kind for kind in ("fp32", "bf16", "int8", "fp8", "fp16") if asked[kind]) or "fp16"
    for precision in Precision:
        if precision == name:
            return precision
    raise UsageError(
        f"--{name.replace('-', ' --')} name no precision together. Give one; --fp16 may stand beside --int8 or --fp8."
    )


def _profiled(
    bundle: Path,
    path: Path,
    asked: dict[str, bool],
    keep: tuple[str, ...],
    calibration: CalibrationOptions | None,
) -> tuple[Precision, tuple[str, ...], CalibrationOptions | None]:
    """A tuned profile's precision, blocks and calibration; UsageError where flags say another or pictures differ."""
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.quantization.profile import read_tuned_profile

    profile = read_tuned_profile(path)
    profile.check_bundle(Bundle.open(bundle))
    if keep or (any(asked.values()) and _precision(asked) != profile.precision):
        raise UsageError(
            f"{path} says {profile.precision} and what is kept. Leave the precision's flags and --keep out."
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
    shown = table("Engines, precision proved from the build log", "engine of", "precision", "size ", "build ", "target")
    for entry in entries:
        size = (bundle / entry.file).stat().st_size
        shown.add_row(entry.graph, entry.precision, si(size, "B"), f"{entry.build_seconds:.1f} s", entry.target)
    stdout.print(shown)
