"""An evaluation as a folder: a page that holds all its pictures, the numbers as JSON, and every row as CSV."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cclip_deploy.common.csv_text import csv_text
from cclip_deploy.common.files import restore_folder, whole_folder
from cclip_deploy.common.html_page import Figure, Section, Table, Tile, write_page
from cclip_deploy.common.names import json_text, printable
from cclip_deploy.common.paths import check_writable
from cclip_deploy.common.plotting import require_matplotlib
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS
from cclip_deploy.evaluation.evaluate import EvaluationResult
from cclip_deploy.evaluation.split import ShownCase
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.imaging.writing import draw_overlay

PAGE, NUMBERS, ROWS = "index.html", "evaluation.json", "rows.csv"
GROUPS = (
    "Rows that have something in common, as far as it is known. Intervals of fewer than "
    f"{FEW_PATIENTS} patients are wide and may cover less often than 95 %."
)
OVERLAY_PX, OVERLAY_QUALITY = 560, 82


def check_report_folder(folder: Path, replace: bool) -> None:
    """Check, before any work is done, that a report can be written.

    Raises:
        UsageError: something else is at `folder`, or a report and `replace` is false.
        EnvironmentIssue: the folder cannot be written, or matplotlib is missing.
    """
    require_matplotlib("A report (-o)")
    check_writable(folder)
    restore_folder(folder)
    if not folder.exists():
        return
    if not replace:
        raise UsageError(f"{folder} exists already. Choose another output, or give --force to replace the report.")
    if not (folder / NUMBERS).is_file():
        raise UsageError(f"{folder} holds no {NUMBERS}, so --force will not replace it. Choose another output.")


@contextmanager
def new_report(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill by `fill_report`, held for this run; it takes its name when the block ends well.

    Raises:
        UsageError, EnvironmentIssue: as `check_report_folder`; TargetInUse where another run writes it.
    """
    check_report_folder(folder, replace)
    with whole_folder(folder) as unfinished:
        check_report_folder(folder, replace)
        unfinished.mkdir()
        yield unfinished


def fill_report(folder: Path, result: EvaluationResult) -> None:
    """Write the page, the numbers and the rows into a folder that `new_report` gave."""
    for name, text in ((NUMBERS, json_text(result.to_dict())), (ROWS, _rows_csv(result)), (PAGE, _page(result))):
        (folder / name).write_text(printable(text), encoding="utf-8", newline="")


def write_report(folder: Path, result: EvaluationResult, replace: bool = False) -> None:
    """Write the report, whole or not at all; raises what `new_report` does, and where the disk is full."""
    with new_report(folder, replace) as unfinished:
        fill_report(unfinished, result)


def score_rows(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """Name, value with interval, and number of rows of every score."""
    scores, tolerance = result.evaluation.scores, f"{result.options.tolerance_px:g}"
    named = (
        ("Dice, mean over rows", scores.dice_per_image.show(), scores.dice_per_image.rows),
        ("IoU, mean over rows", scores.iou_per_image.show(), scores.iou_per_image.rows),
        ("Dice, pooled over all pixels", scores.dice_pooled.show(), scores.dice_pooled.rows),
        ("IoU, pooled over all pixels", scores.iou_pooled.show(), scores.iou_pooled.rows),
        ("HD95 (pixels)", scores.hd95_px.show(2), scores.hd95_px.rows),
        (f"Boundary Dice within {tolerance} pixels", scores.boundary_dice.show(), scores.boundary_dice.rows),
        ("Expected calibration error", scores.expected_calibration_error.show(4), result.data.rows),
        ("Brier score", scores.brier.show(4), result.data.rows),
        ("Empty references found empty", scores.empty_found_empty.show(), scores.empty_found_empty.rows),
    )
    return [(name, value, f"{rows:,}") for name, value, rows in named]


def control_rows(result: EvaluationResult) -> list[tuple[str, ...]]:
    """Name, meaning, rows of all rows, Dice true, Dice of the control, paired difference, IoU of both predictions."""
    return [
        (c.name, c.missing or c.meaning, c.coverage.show(), c.true_dice.show(), c.dice.show(), c.difference.show(),
         c.iou_with_own.show())
        for c in result.evaluation.controls
    ]  # fmt: skip


def remarks(result: EvaluationResult) -> list[str]:
    """What a reader must know to read the numbers right."""
    data, options = result.data, result.options
    empty = "count Dice and IoU 1 where nothing is predicted, else 0"
    empty = empty if options.empty == "one" else "are left out of means over rows"
    said = [f"Empty references ({data.empty_masks} of {data.rows} rows) {empty}; pooled numbers hold all pixels."]
    outlined = result.evaluation.scores.hd95_px.rows
    if outlined < data.rows:
        said.append(f"Distances of outlines are of the {outlined} rows where neither mask is empty.")
    if data.cut_prompts:
        length = result.network["prompt_length"]
        said.append(f"{data.cut_prompts} prompts are longer than {length} tokens and were cut before their end.")
    if data.repaired_prompts:
        said.append(
            f"{data.repaired_prompts} prompts had typing errors that were repaired (cclip-deploy data lists them)."
        )
    ran, graphs = result.network["ran"], result.network["graphs"]
    said.append(f"Ran in {ran['ran']}: {', '.join(f'{name} in {precision}' for name, precision in graphs.items())}.")
    if ran["fallback_reason"] is not None:
        said.append(f"{ran['asked']} was requested and did not run: {ran['fallback_reason']}")
    return said + _coverage_remarks(result)


def _coverage_remarks(result: EvaluationResult) -> list[str]:
    """Which rows no control or group could use, and why."""
    controls, groups = result.evaluation.controls, result.evaluation.group_coverage
    said = [
        f"Control {c.name}: {c.coverage.show()} rows; left out are {c.coverage.describe_left_out()}."
        for c in controls
        if c.coverage.left_out
    ]
    said += [
        f"Control {c.name}: too many other sentences for all of them, so {c.drawn} were drawn for each row (seed "
        f"{result.options.seed}); the interval holds the error of the draw."
        for c in controls
        if c.drawn is not None
    ]
    return said + [
        f"Groups by {g.by}: known of {g.coverage.show()} rows"
        + (f"; of the others {g.coverage.describe_left_out()}." if g.coverage.left_out else ".")
        for g in groups
    ]


def _rows_csv(result: EvaluationResult) -> str:
    names = [control.name for control in result.evaluation.controls]
    head = ("image", "mask", "text", "patient", "dice", "iou", "hd95_px", "boundary_dice", "predicted_pixels",
            "reference_pixels", "prompt_cut")  # fmt: skip
    table: list[list[object]] = [[*head, *(f"dice_{name.replace('-', '_')}" for name in names)]]
    for sample, row in zip(result.samples, result.measurements.rows, strict=True):
        outlines = ("", "") if row.outlines is None else (row.outlines.hd95_px, row.outlines.boundary_dice)
        controls = [row.controls[name].dice if name in row.controls else "" for name in names]
        table.append([
            sample.image, sample.mask, sample.text, sample.subject, row.overlap.dice, row.overlap.iou,
            *outlines, row.overlap.predicted, row.overlap.reference, int(row.cut), *controls,
        ])  # fmt: skip
    return csv_text(table)


def _page(result: EvaluationResult) -> str:
    data, network = result.data, result.network
    scores = Table(("score", "value [95 % interval]", "rows"), tuple(score_rows(result)), frozenset({1, 2}))
    sections = [
        Section("", tuple(f"Warning: {warning}" for warning in result.warnings()), tiles=_tiles(result)),
        Section("", figures=_plots(result)),
        Section("Does the sentence find the mask?", table=_control_table(result)),
        Section("All scores", tuple(remarks(result)), table=scores),
        Section("Groups", (GROUPS,), table=_group_table(result)),
        *_worst_sections(result),
        Section("How it was made", _provenance(result)),
    ]
    lead = (
        f"{network['kind'].capitalize()} {network['name']} ({network['model']}, {_size(network['image_hw'])}, "
        f"{network['backend']} {network['precision']}) on the {data.split} split of {Path(data.folder).name}: "
        f"{data.rows:,} prompts on {data.images:,} images of {data.patients:,} patients. "
        "In brackets: 95 % intervals over patients."
    )
    return write_page("Evaluation", lead, sections)


def _plots(result: EvaluationResult) -> tuple[Figure, ...]:
    from cclip_deploy.evaluation.plots import draw_calibration, draw_controls, draw_curve, draw_spread

    evaluation, mean = result.evaluation, result.evaluation.scores.dice_per_image
    rows = zip(result.measurements.rows, result.evaluation.counted, strict=True)
    return (
        Figure(
            draw_controls(evaluation.controls, mean),
            "Dice with the true prompts and with other ones; bars are 95 % intervals.",
        ),
        Figure(
            draw_curve(evaluation.curve, result.threshold),
            "Dice by threshold. One that is chosen here flatters itself: choose it on the validation split.",
        ),
        Figure(
            draw_calibration(evaluation.calibration),
            "Of the pixels that are given a probability, the share that is inside; below, how many they are.",
        ),
        Figure(draw_spread([row.overlap.dice for row, use in rows if use], mean), "Dice of every row that counts."),
    )


def _tiles(result: EvaluationResult) -> tuple[Tile, ...]:
    scores, controls = result.evaluation.scores, {c.name: c for c in result.evaluation.controls}
    return (
        Tile.of("Dice, mean over rows", scores.dice_per_image.show()),
        Tile.of("Dice, pooled", scores.dice_pooled.show()),
        Tile.of("lost with shuffled prompts", controls["shuffled"].difference.show()),
        Tile.of("HD95, pixels", scores.hd95_px.show(2)),
        Tile.of(f"boundary Dice, {result.options.tolerance_px:g} pixels", scores.boundary_dice.show()),
        Tile.of("calibration error", scores.expected_calibration_error.show(4)),
    )


def _control_table(result: EvaluationResult) -> Table:
    head = (
        "prompt",
        "what is asked",
        "rows",
        "Dice, true prompt",
        "Dice, this prompt",
        "difference",
        "IoU of both predictions",
    )
    return Table(head, tuple(control_rows(result)), frozenset(range(2, 7)))  # fmt: skip


def _group_table(result: EvaluationResult) -> Table:
    rows = tuple(
        (g.by, g.group, f"{g.dice_per_image.rows:,}", f"{g.dice_per_image.patients:,}", g.dice_per_image.show(),
         g.dice_pooled.show())
        for g in result.evaluation.groups
    )  # fmt: skip
    head = ("by", "group", "rows", "patients", "Dice, mean over rows", "Dice, pooled")
    return Table(head, rows, frozenset({2, 3, 4, 5}))


def _worst_sections(result: EvaluationResult) -> list[Section]:
    measurements = result.measurements
    found = [
        Section(title, (f"{text} Blue is predicted, orange is the reference.",), figures=_overlays(result, cases))
        for title, text, cases in (
            ("Worst cases", "The rows of lowest Dice, of those that have a target.", measurements.worst),
            ("Found where nothing is", "Of the rows without a target, the largest predictions.", measurements.invented),
        )
        if cases
    ]
    return found


def _overlays(result: EvaluationResult, cases: Sequence[ShownCase]) -> tuple[Figure, ...]:
    figures = []
    for case in cases:
        sample = result.samples[case.row]
        pixels = read_image(sample.image).pixels
        overlay = draw_overlay(pixels, case.mask(), sample.text, read_mask(sample.mask))
        overlay.thumbnail((OVERLAY_PX, 2 * OVERLAY_PX))
        file = io.BytesIO()
        overlay.save(file, "JPEG", quality=OVERLAY_QUALITY)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        row = result.measurements.rows[case.row].overlap
        said = f"Dice {row.dice:.3f}" if row.reference else f"{row.predicted:,} pixels predicted"
        figures.append(Figure(source, f"{sample.image.name}: {said}"))
    return tuple(figures)


def _provenance(result: EvaluationResult) -> tuple[str, ...]:
    network = result.network
    return (
        f"Command: {result.command}" if result.command else "Made by the library, not by the command line.",
        f"Checkpoint SHA-256 {network['checkpoint_sha256']}. Threshold {result.threshold:g}. Prompts of up to "
        f"{network['prompt_length']} tokens. Seed {result.options.seed}. {result.seconds:.0f} s.",
        f"{ROWS} holds every row, {NUMBERS} every number of this page.",
    )


def _size(image_hw: Sequence[int]) -> str:
    return f"{image_hw[0]}×{image_hw[1]}"
