"""The command `cclip-deploy train`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table

if TYPE_CHECKING:
    from cclip_deploy.model.clip_start import ClipStart
    from cclip_deploy.train.loop import TrainProgress
    from cclip_deploy.train.run import TrainReport


@reports_errors
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see training/configs/.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Data-set folder. Default: the one that the recipe names.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output folder of the run. Default: runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output folder.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Epochs, in place of the recipe's.", min=1)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Recipe key to change, as in --set game.masker_steps=2; may be repeated."),
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help="Initial weights of the towers: open_clip's name of RN101 weights, or a file.")
    ] = None,
    allow_outside: options.AllowOutside = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one step and one validation on the first images; write nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Train a network by a [bold]recipe[/]; write the last and the best checkpoint, logs and a record of the run."""
    from cclip_deploy.common.toml_file import parse_settings
    from cclip_deploy.train.config import TrainConfig
    from cclip_deploy.train.run import RunOptions, find_data
    from cclip_deploy.train.run import train as run

    changes = parse_settings([*(set_ or ()), *([f"epochs={epochs}"] if epochs else ())])
    config = TrainConfig.from_toml(recipe, data, clip_weights, changes)
    if allow_outside:
        config = config.model_copy(update={"data": config.data.model_copy(update={"allow_outside": True})})
    with progress(quiet=json) as on_progress:
        report = run(
            config, find_data(config, on_progress), output or Path("runs") / recipe.stem, _step_reporter(on_progress),
            RunOptions(resume, dry_run=dry_run), on_progress,
        )  # fmt: skip
    if report.rank == 0:
        print_json(_to_json(report), "train") if json else _show(report)


def _step_reporter(on_progress: Callable[[str], None]) -> Callable[[TrainProgress], None]:
    started, first = time.monotonic(), 0

    def report(p: TrainProgress) -> None:
        nonlocal started, first
        if not first:
            started, first = time.monotonic(), p.step
        if p.step % 10 == 0 or p.step == p.steps:
            dice = "" if p.dice is None else f", Dice {p.dice:.3f}"
            pace_s = (time.monotonic() - started) / max(p.step - first, 1)
            left = f", {timedelta(seconds=round(pace_s * (p.steps - p.step)))} left" if p.step > first else ""
            on_progress(f"Epoch {p.epoch}, step {p.step} of {p.steps}, loss {p.loss:.3f}{dice}{left}")

    return report


def _to_json(report: TrainReport) -> dict[str, Any]:
    clip = None if report.clip is None else {"found": list(report.clip.found), "missing": list(report.clip.missing)}
    values = {**report.__dict__, "folder": str(report.folder), "checkpoint": str(report.checkpoint), "clip": clip}
    return {key: value for key, value in values.items() if key != "rank"}


def _show(report: TrainReport) -> None:
    shown = table(f"{report.folder}, {report.epochs} epochs, {report.steps} steps", "", "value ")
    rows = {
        "images, prompts": f"{report.images}, {report.rows}",
        "prompts cut to length": str(report.cut_prompts),
        "loss: first step, last tenth of the steps": f"{report.first_loss:.3f}, {report.last_loss:.3f}",
        "best Dice on val": "no val split" if report.best_dice is None else f"{report.best_dice:.3f}",
        "best epoch": str(report.best_epoch or "") + (", stopped early" if report.stopped_early else ""),
        "means of the causal masks": ", ".join(f"{mean:.2f}" for mean in report.mask_means),
        "training": f"{report.training_s:.0f} s, {report.waiting_share:.1%} of it waiting for data",
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    stdout.print(shown)
    if report.clip is not None:
        _show_clip(report.clip)
    stdout.print(f"Checkpoint: {report.checkpoint}", markup=False)


def _show_clip(clip: ClipStart) -> None:
    """Print the number of tensors loaded from CLIP for each part of the towers, and the names of the missing ones."""
    found, missing = (Counter(".".join(name.split(".")[:2]) for name in names) for names in (clip.found, clip.missing))
    shown = table("Initialized from CLIP", "part", "found ", "not found ")
    for part in sorted({*found, *missing}):
        shown.add_row(part, str(found[part]), str(missing[part]))
    stdout.print(shown)
    stdout.print("Not in CLIP, initialized at random: " + ", ".join(clip.missing), markup=False)
