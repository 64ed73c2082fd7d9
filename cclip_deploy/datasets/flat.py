"""Read the flat layout: a table with image, mask and text in each row, as CSV, Excel or JSON Lines."""

from __future__ import annotations

import shlex
from pathlib import Path

from cclip_deploy.common.paths import check_inside
from cclip_deploy.datasets.columns import CANONICAL, split_of
from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.read_log import ReadLog
from cclip_deploy.datasets.sample import SHOWN_NAMES, SPLITS, Sample, check_sizes, subject_of
from cclip_deploy.datasets.tables import Row, has_known_header, read_roles
from cclip_deploy.errors import DataError

TABLE_NAME, JSON_TABLE_NAME = "table.csv", "table.jsonl"
FLAT_COLUMNS = tuple(CANONICAL.values())
ROLES = {"image": True, "mask": True, "prompt": True, "split": False, "patient": False}
"""Roles of the columns, and whether each is required."""
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".xlsx"})


def find_tables(folder: Path) -> list[Path]:
    """Return the tables directly in a folder: .csv, .tsv, .jsonl and .xlsx files, and .txt files with a known header.

    Hidden files and Excel's lock files (`~$table.xlsx`) are skipped.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith((".", "~$"))]
    tables = [path for path in files if path.suffix.lower() in TABLE_SUFFIXES]
    return tables or [path for path in files if path.suffix.lower() == ".txt" and has_known_header(path)]


def read_flat(folder: Path, options: DataSetOptions = DETECTED, log: ReadLog | None = None) -> list[Sample]:
    """Read the table in `folder`: the columns of image, mask and prompt and, optionally, of split and patient.

    Columns are found by their names (see `columns`). Files are relative to the folder; absolute paths and those with
    `..` need `allow_outside`. Several tables are read together if their names are those of splits, such as train.csv
    and test.csv. The default split is that of the table's name, or "train"; the default patient is taken from the
    image's name (see `sample.subject_of`). An image may have several rows with different texts. In JSON Lines the
    columns are keys, and each row may omit the optional ones.

    Raises:
        DataError: no table or several, a missing or ambiguous column, an empty table or field, a missing file, a file
            outside the folder, a mask of another size than its image, a repeated text for one image, or an unknown
            split.
    """
    log = log or ReadLog()
    samples: list[Sample] = []
    seen: dict[tuple[Path, str], str] = {}
    for table, split in _choose_tables(folder, options.table).items():
        rows, table_format = read_roles(table, ROLES, options)
        log.tables.append(table_format)
        for row in rows:
            sample = _read_sample(folder, row, split, options)
            first = seen.setdefault((sample.image, sample.text), row.where)
            if first != row.where:
                raise DataError(
                    f"{row.where}: {sample.image.name} has the text {sample.text!r} in {_row(first)} too. Keep one."
                )
            samples.append(sample)
    return samples


def _choose_tables(folder: Path, name: str | None) -> dict[Path, str]:
    """Return the tables to read, each with the default split of its rows."""
    if not folder.is_dir():
        raise DataError(f"There is no data-set folder {folder}. Check the path.")
    tables = find_tables(folder) if name is None else [folder / name]
    if len(tables) == 1:
        return {tables[0]: "train"}
    splits = [split_of(table.stem) for table in tables]
    if tables and len({*splits} - {None}) == len(tables):
        return {table: split for table, split in zip(tables, splits, strict=True) if split}
    found = ", ".join(table.name for table in tables) or "none"
    options = " or ".join(f"--table {shlex.quote(table.name)}" for table in tables[:SHOWN_NAMES])
    remedy = f"Choose one with {options} (data.table in a recipe). " if tables else ""
    raise DataError(
        f"{folder} must have exactly one .csv, .tsv, .xlsx or .jsonl table, or one for each split; found: {found}. "
        f"{remedy}The columns of the flat layout are {', '.join(FLAT_COLUMNS)}."
    )


def _read_sample(folder: Path, row: Row, split: str, options: DataSetOptions) -> Sample:
    for role, value in row.values.items():
        if not value:
            raise DataError(f"{row.where}: {CANONICAL[role]} is empty. Fill it in, or remove the row.")
    if "split" in row.values:
        split = _read_split(row)
    names = (row.values[role] for role in ("image", "mask"))
    image, mask = (check_inside(folder, name, row.where, options.allow_outside) for name in names)
    check_sizes(image, mask, row.where)
    subject = row.values.get("patient") or subject_of(row.values["image"], options.subject_pattern)
    return Sample(image, mask, row.values["prompt"], split, subject, options.mask_values)


def _read_split(row: Row) -> str:
    split = split_of(row.values["split"])
    if split is None:
        raise DataError(
            f"{row.where}: unknown split {row.values['split']!r}. Splits are {', '.join(SPLITS)} and their synonyms, "
            "such as training, valid, dev and testing. Correct it, or give --column split= to read all rows as train."
        )
    return split


def _row(where: str) -> str:
    """Return the part of a row's place after the name of its table: `row 2`."""
    return where[where.rindex("row ") :]
