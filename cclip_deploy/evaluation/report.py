"""Evaluation report: a folder with an HTML page, all numbers as JSON, and every row as CSV."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cclip_deploy.common.csv_text import csv_text
from cclip_deploy.common.files import restore_folder, whole_folder
from cclip_deploy.common.html_page import Figure, Section, Table, Tile, write_page
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import check_writable
from cclip_deploy.common.plotting import require_matplotlib
from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS
from cclip_deploy.evaluation.evaluate import EvaluationResult
from cclip_deploy.evaluation.split import ExampleCase
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.imaging.writing import draw_overlay

PAGE, NUMBERS, ROWS = "index.html", "evaluation.json", "rows.csv"
GROUPS = (
    "Dice by subgroup, for the rows whose group is known. Intervals of fewer than "
    f"{FEW_PATIENTS} patients are wide, and their coverage may be below 95 %."
)
OVERLAY_PX, OVERLAY_QUALITY = 560, 82


def check_report_folder(folder: Path, replace: bool) -> None:
    """Check that a report can be written, before any work is done.

    Raises:
        UsageError: `folder` exists, and either `replace` is false or it holds no report.
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
    """Yield a temporary folder for `fill_report`, which is renamed to `folder` when the block succeeds.

    Raises:
        UsageError, EnvironmentIssue: as in `check_report_folder`.
        TargetInUse: another run writes to `folder`.
    """
    check_report_folder(folder, replace)
    with whole_folder(folder) as unfinished:
        check_report_folder(folder, replace)
        unfinished.mkdir()
        yield unfinished


def fill_report(folder: Path, result: EvaluationResult) -> None:
    """Write page, numbers and rows into a folder from `new_report`."""
    for name, text in ((NUMBERS, json_text(result.to_dict())), (ROWS, _rows_csv(result)), (PAGE, _page(result))):
        (folder / name).write_text(printable(text), encoding="utf-8", newline="")


def write_report(folder: Path, result: EvaluationResult, replace: bool = False) -> None:
    """Write a report atomically; raises the errors of `new_report`."""
    with new_report(folder, replace) as unfinished:
        fill_report(unfinished, result)


def score_rows(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """Return name, value with interval, and number of rows of every score."""
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
        ("Empty references predicted empty", scores.empty_found_empty.show(), scores.empty_found_empty.rows),
    )
    return [(name, value, f"{rows:,}") for name, value, rows in named]


def control_rows(result: EvaluationResult) -> list[tuple[str, ...]]:
    """Return the cells of every control: name, meaning, coverage, true Dice, its Dice, difference, IoU with own."""
    return [
        (c.name, c.missing or c.meaning, c.coverage.show(), c.true_dice.show(), c.dice.show(), c.difference.show(),
         c.iou_with_own.show())
        for c in result.evaluation.controls
    ]  # fmt: skip


def remarks(result: EvaluationResult) -> list[str]:
    """Return remarks on how the scores were computed."""
    data, options = result.data, result.options
    empty = "count as Dice and IoU 1 if nothing is predicted, else 0"
    empty = empty if options.empty == "one" else "are left out of means over rows"
    found = [f"Empty references ({data.empty_masks} of {data.rows} rows) {empty}; pooled scores include all pixels."]
    with_boundary = result.evaluation.scores.hd95_px.rows
    if with_boundary < data.rows:
        found.append(f"Boundary metrics include the {with_boundary} rows in which neither mask is empty.")
    if data.cut_prompts:
        length = result.network["prompt_length"]
        found.append(f"{data.cut_prompts} prompts are longer than {length} tokens and were truncated.")
    if data.repaired_prompts:
        found.append(
            f"Misspelled words were corrected in {data.repaired_prompts} prompts (cclip-deploy data lists them)."
        )
    ran, graphs = result.network["ran"], result.network["graphs"]
    found.append(f"Ran in {ran['ran']}: {', '.join(f'{name} in {precision}' for name, precision in graphs.items())}.")
    if ran["fallback_reason"] is not None:
        found.append(f"{ran['asked']} was requested and did not run: {ran['fallback_reason']}")
    return found + _coverage_remarks(result)


def _coverage_remarks(result: EvaluationResult) -> list[str]:
    """Return remarks on the rows that controls and subgroups leave out."""
    controls, groups = result.evaluation.controls, result.evaluation.group_coverage
    found = [
        f"Control {c.name}: {c.coverage.show()} rows; left out: {c.coverage.describe_left_out()}."
        for c in controls
        if c.coverage.left_out
    ]
    found += [
        f"Control {c.name}: too many prompts to use all, so {c.drawn} were sampled per row (seed "
        f"{result.options.seed}); the interval includes the sampling error."
        for c in controls
        if c.drawn is not None
    ]
    return found + [
        f"Groups by {g.by}: known for {g.coverage.show()} rows"
        + (f"; others: {g.coverage.describe_left_out()}." if g.coverage.left_out else ".")
        for g in groups
    ]


def _rows_csv(result: EvaluationResult) -> str:
    names = [control.name for control in result.evaluation.controls]
    head = ("image", "mask", "text", "patient", "dice", "iou", "hd95_px", "boundary_dice", "predicted_pixels",
            "reference_pixels", "prompt_cut")  # fmt: skip
    table: list[list[object]] = [[*head, *(f"dice_{name.replace('-', '_')}" for name in names)]]
    for sample, row in zip(result.samples, result.measurements.rows, strict=True):
        boundaries = ("", "") if row.boundary is None else (row.boundary.hd95_px, row.boundary.boundary_dice)
        controls = [row.controls[name].dice if name in row.controls else "" for name in names]
        table.append([
            sample.image, sample.mask, sample.text, sample.subject, row.overlap.dice, row.overlap.iou,
            *boundaries, row.overlap.predicted, row.overlap.reference, int(row.cut), *controls,
        ])  # fmt: skip
    return csv_text(table)


def _page(result: EvaluationResult) -> str:
    data, network = result.data, result.network
    scores = Table(("score", "value [95 % interval]", "rows"), tuple(score_rows(result)), frozenset({1, 2}))
    sections = [
        Section("", warnings=tuple(result.warnings()), tiles=_tiles(result)),
        Section("", figures=_plots(result)),
        Section("Prompt controls", table=_control_table(result)),
        Section("All scores", tuple(remarks(result)), table=scores),
        Section("Subgroups", (GROUPS,), table=_group_table(result)),
        *_case_sections(result),
        Section("Provenance", _provenance(result)),
    ]
    lead = (
        f"{network['kind'].capitalize()} {network['name']} ({network['model']}, {_size(network['image_hw'])}, "
        f"{network['backend']} {network['precision']}) on the {data.split} split of {Path(data.folder).name}: "
        f"{data.rows:,} prompts on {data.images:,} images of {data.patients:,} patients. "
        "Brackets are 95 % intervals over patients."
    )
    return write_page("Evaluation", lead, sections)


def _plots(result: EvaluationResult) -> tuple[Figure, ...]:
    from cclip_deploy.evaluation.plots import draw_calibration, draw_controls, draw_curve, draw_dice_histogram

    evaluation, mean = result.evaluation, result.evaluation.scores.dice_per_image
    rows = zip(result.measurements.rows, result.evaluation.counted, strict=True)
    return (
        Figure(
            draw_controls(evaluation.controls, mean),
            "Dice with the true prompts and with the controls; bars are 95 % intervals.",
        ),
        Figure(
            draw_curve(evaluation.curve, result.threshold),
            "Dice by threshold. Choose a threshold on the validation split; one chosen here would be biased.",
        ),
        Figure(
            draw_calibration(evaluation.calibration),
            "Fraction of pixels inside the reference by predicted probability, and the number of pixels below.",
        ),
        Figure(
            draw_dice_histogram([row.overlap.dice for row, use in rows if use], mean), "Dice of every row that counts."
        ),
    )


def _tiles(result: EvaluationResult) -> tuple[Tile, ...]:
    scores, controls = result.evaluation.scores, {c.name: c for c in result.evaluation.controls}
    return (
        Tile.of("Dice, mean over rows", scores.dice_per_image.show()),
        Tile.of("Dice, pooled", scores.dice_pooled.show()),
        Tile.of("Dice lost with shuffled prompts", controls["shuffled"].difference.show()),
        Tile.of("HD95, pixels", scores.hd95_px.show(2)),
        Tile.of(f"boundary Dice, {result.options.tolerance_px:g} pixels", scores.boundary_dice.show()),
        Tile.of("calibration error", scores.expected_calibration_error.show(4)),
    )


def _control_table(result: EvaluationResult) -> Table:
    head = ("prompt", "description", "rows", "Dice, true prompt", "Dice, this prompt", "difference", "IoU of both")
    return Table(head, tuple(control_rows(result)), frozenset(range(2, 7)))


def _group_table(result: EvaluationResult) -> Table:
    rows = tuple(
        (g.by, g.group, f"{g.dice_per_image.rows:,}", f"{g.dice_per_image.patients:,}", g.dice_per_image.show(),
         g.dice_pooled.show())
        for g in result.evaluation.groups
    )  # fmt: skip
    head = ("by", "group", "rows", "patients", "Dice, mean over rows", "Dice, pooled")
    return Table(head, rows, frozenset({2, 3, 4, 5}))


def _case_sections(result: EvaluationResult) -> list[Section]:
    worst, false_positives = result.measurements.worst, result.measurements.false_positives
    return [
        Section(title, (f"{text} Blue is predicted, orange is the reference.",), figures=_overlays(result, cases))
        for title, text, cases in (
            ("Worst cases", "The rows with a target and the lowest Dice.", worst),
            ("False positives", "The rows without a target and the largest predictions.", false_positives),
        )
        if cases
    ]


def _overlays(result: EvaluationResult, cases: Sequence[ExampleCase]) -> tuple[Figure, ...]:
    figures = []
    for case in cases:
        sample = result.samples[case.row]
        pixels = read_image(sample.image).pixels
        overlay = draw_overlay(pixels, case.mask(), sample.text, sample.read_mask())
        overlay.thumbnail((OVERLAY_PX, 2 * OVERLAY_PX))
        file = io.BytesIO()
        overlay.save(file, "JPEG", quality=OVERLAY_QUALITY)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        row = result.measurements.rows[case.row].overlap
        score = f"Dice {row.dice:.3f}" if row.reference else f"{row.predicted:,} pixels predicted"
        figures.append(Figure(source, f"{sample.image.name}: {score}"))
    return tuple(figures)


def _provenance(result: EvaluationResult) -> tuple[str, ...]:
    network = result.network
    return (
        f"Command: {result.command}" if result.command else "Created by the library, not by the command line.",
        f"Checkpoint SHA-256 {network['checkpoint_sha256']}. Threshold {result.threshold:g}. Prompts of up to "
        f"{network['prompt_length']} tokens. Seed {result.options.seed}. {result.seconds:.0f} s.",
        f"{ROWS} contains every row, {NUMBERS} all numbers of this page.",
    )


def _size(image_hw: Sequence[int]) -> str:
    return f"{image_hw[0]}×{image_hw[1]}"
