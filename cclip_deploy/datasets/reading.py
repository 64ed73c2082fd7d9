"""Read a data-set folder of any supported layout into samples, with spelling errors in prompts repaired."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cclip_deploy.datasets.flat import find_tables, read_flat
from cclip_deploy.datasets.lvit import (
    has_languidemedseg,
    has_lvit,
    is_lvit_table,
    read_languidemedseg,
    read_lvit,
)
from cclip_deploy.datasets.medvlsm import has_medvlsm, read_medvlsm
from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.read_log import ReadLog
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.datasets.tables import TableFormat
from cclip_deploy.errors import DataError, PromptError, UsageError
from cclip_deploy.prompts.spelling import RepairedPrompt, repair_prompt


@dataclass(frozen=True)
class Layout:
    """Data-set format: how to detect it and how to read it.

    Attributes:
        found_in: whether a folder has this layout.
        read: called with folder, options and log.
        looks: files by which the layout is recognized, for messages.
    """

    found_in: Callable[[Path], bool]
    read: Callable[[Path, DataSetOptions, ReadLog], list[Sample]]
    looks: str


LAYOUTS = {
    "lvit": Layout(has_lvit, read_lvit, "Train_Folder, Val_Folder or Test_Folder"),
    "languidemedseg": Layout(has_languidemedseg, read_languidemedseg, "prompt/train.csv or prompt/test.csv"),
    "medvlsm": Layout(has_medvlsm, read_medvlsm, "anns/train.json, val.json or test.json"),
    "flat": Layout(
        lambda folder: any(not is_lvit_table(table.name) for table in find_tables(folder)),
        read_flat,
        "a .csv, .tsv, .xlsx or .jsonl table, or a .txt table with the columns image, mask and text",
    ),
}


@dataclass(frozen=True)
class DataSet:
    """Data set for training and evaluation, one sample per row, with repaired texts."""

    folder: Path
    layout: str
    samples: tuple[Sample, ...]
    repaired: tuple[tuple[int, RepairedPrompt], ...]
    """Row numbers and repairs of the texts that were repaired."""
    tables: tuple[TableFormat, ...] = ()
    """How each table was read; none in the layout medvlsm."""


def find_layout(folder: Path) -> str:
    """Return the name of a folder's layout; raise DataError if it has none, or several."""
    if not folder.is_dir():
        raise DataError(f"There is no data-set folder {folder}. Check the path.")
    found = _layouts_in(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder} looks like several layouts: {', '.join(found)}. Name one with --layout.")
    looks = "; ".join(f"{name}: {layout.looks}" for name, layout in LAYOUTS.items())
    raise DataError(f"{folder} has none of the layouts that are supported. Each is recognized by: {looks}.")


def has_layout(folder: Path) -> bool:
    """Return whether a folder has at least one of the layouts."""
    return bool(_layouts_in(folder))


def read_data_set(folder: Path, options: DataSetOptions = DETECTED) -> DataSet:
    """Read a data-set folder; spelling errors in prompts are repaired and recorded, and no row is dropped.

    Args:
        folder: the data set.
        options: layout, columns, patients and values of masks, where they are not detected.

    Raises:
        DataError: the folder, its tables or its files do not have the layout.
        EnvironmentIssue: an image is DICOM and pydicom is not installed.
        UsageError: unknown layout, or the subject pattern is not a regular expression.
    """
    if options.layout is not None and options.layout not in LAYOUTS:
        raise UsageError(f"Unknown layout {options.layout!r}. Layouts are {', '.join(LAYOUTS)}.")
    if not folder.is_dir():
        raise DataError(f"There is no data-set folder {folder}. Check the path.")
    name = options.layout or ("flat" if options.table else find_layout(folder))
    log = ReadLog()
    written = LAYOUTS[name].read(folder, options, log)
    if not written:
        raise DataError(f"{folder} has no rows in the {name} layout, which is recognized by {LAYOUTS[name].looks}.")
    prompts = [_repair(sample) for sample in written]
    samples = tuple(dataclasses.replace(r, text=prompt.text) for r, prompt in zip(written, prompts, strict=True))
    return DataSet(folder, name, samples, tuple((n, prompt) for n, prompt in enumerate(prompts) if prompt.repairs),
                   tuple(log.tables))  # fmt: skip


def _repair(sample: Sample) -> RepairedPrompt:
    try:
        return repair_prompt(sample.text)
    except PromptError as error:
        raise DataError(f"{sample.image}, split {sample.split}: {error}") from error


def _layouts_in(folder: Path) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout.found_in(folder)]
