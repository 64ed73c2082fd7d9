"""Read CSV, Excel and JSON Lines tables into rows of text by column."""

from __future__ import annotations

import csv
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cclip_deploy.common.json_file import parse_json
from cclip_deploy.common.limits import LARGEST_TABLE, LONGEST_LINE, MOST_CELLS, MOST_ROWS
from cclip_deploy.common.paths import check_regular_file
from cclip_deploy.datasets.workbook import read_sheet
from cclip_deploy.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row; `where` is the table and row number for messages, counted like a spreadsheet (the header is row 1)."""

    where: str
    values: dict[str, str]


def read_table(table: Path) -> list[Row]:
    """Read the rows of a .csv, .xlsx or .jsonl file; JSON Lines rows are numbered by line, from 1.

    Raises:
        DataError: the table cannot be read, is too large, or has no rows.
    """
    check_regular_file(table, "table", DataError, LARGEST_TABLE)
    readers = {".xlsx": _read_xlsx, ".jsonl": _read_json_lines}
    return readers.get(table.suffix.lower(), _read_csv)(table)


def read_described(
    table: Path, name_column: str = "Image", text_column: str = "Description"
) -> list[tuple[Row, str, str]]:
    """Read a table of file names and texts as (row, name, text); column case and other columns are ignored.

    Raises:
        DataError: a column is missing, a field is empty, or a name is in two rows.
    """
    found: list[tuple[Row, str, str]] = []
    seen: dict[str, str] = {}
    for row in read_table(table):
        values = {column.lower(): value.strip() for column, value in row.values.items()}
        for column in (name_column, text_column):
            if column.lower() not in values:
                held = ", ".join(column for column in row.values if column)
                raise DataError(f"{table} has no column {column!r}; its columns are {held}. Add or rename it.")
            if not values[column.lower()]:
                raise DataError(f"{row.where}: {column} is empty. Fill it in, or remove the row.")
        name = values[name_column.lower()]
        first = seen.setdefault(name, row.where)
        if first != row.where:
            raise DataError(
                f"{row.where}: {name} is in {first} too, but this layout has one text per mask. Keep one row."
            )
        found.append((row, name, values[text_column.lower()]))
    return found


def _read_csv(table: Path) -> list[Row]:
    """Read CSV in UTF-8, with or without a byte-order mark."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(_limited_lines(table, file), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{table} cannot be read as a CSV table in UTF-8: {error}. Save it again as CSV, UTF-8."
        ) from error
    return _make_rows(table, lines, "Quote texts that hold commas.")


def _limited_lines(table: Path, file: TextIO) -> Iterator[str]:
    """Yield the lines of a table; raise DataError for a line that is too long, or too many lines or commas."""
    commas = 0
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
        commas += line.count(",")
        if len(line) > LONGEST_LINE:
            raise DataError(f"{table}, line {number} has more than {LONGEST_LINE:,} characters. Split it.")
        if number > MOST_ROWS or commas > MOST_CELLS:
            raise DataError(f"{table} exceeds the limit of {MOST_ROWS:,} lines or {MOST_CELLS:,} commas. Split it.")
        yield line


def _read_xlsx(table: Path) -> list[Row]:
    """Read the first sheet of a workbook; formulas give their last saved value."""
    try:
        lines = read_sheet(table)
    except DataError:
        raise
    except Exception as error:  # zipfile and the XML parser may raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{table} cannot be read as an Excel workbook: {reason}. Save it again as .xlsx, or as CSV in UTF-8."
        ) from error
    width = max((len(line) for line in lines), default=0)
    if width * len(lines) > MOST_CELLS:
        raise DataError(
            f"{table} has {len(lines):,} rows and {width:,} columns, more than {MOST_CELLS:,} cells. Delete everything "
            "outside the table, or save it as CSV (UTF-8)."
        )
    return _make_rows(table, [line + [""] * (width - len(line)) for line in lines], "Fill the header's cells.")


def _make_rows(table: Path, lines: Sequence[Sequence[str]], advice: str) -> list[Row]:
    filled = list(lines)
    while filled and not any(filled[-1]):
        filled.pop()
    if len(filled) < 2:
        raise DataError(f"{table} is empty; it needs a header and at least one row.")
    header = [name.strip() for name in filled[0]]
    for name, count in Counter(header).items():
        if name and count > 1:
            raise DataError(f"{table}, row 1: column {name!r} is repeated. Keep one.")
    for number, line in enumerate(filled[1:], start=2):
        if len(line) != len(header):
            raise DataError(f"{table}, row {number} has {len(line)} fields, the header {len(header)}. {advice}")
    return [
        Row(f"{table}, row {number}", dict(zip(header, line, strict=True))) for number, line in enumerate(filled[1:], 2)
    ]


def _read_json_lines(table: Path) -> list[Row]:
    try:
        with table.open(encoding="utf-8-sig") as file:
            rows = [
                _read_json_line(f"{table}, row {number}", line)
                for number, line in enumerate(_limited_lines(table, file), 1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as UTF-8: {error}. Save it again in UTF-8.") from error
    if not rows:
        raise DataError(f"{table} is empty; it needs at least one line with an object.")
    return rows


def _read_json_line(where: str, line: str) -> Row:
    def keep_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise DataError(f"{where}: {name!r} is repeated. Keep one.")
        return dict(pairs)

    values = parse_json(line, where, object_pairs_hook=keep_once)
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}; expected an object with image, mask and text.")
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {reprlib.repr(value)}; expected a text. Put it in quotes.")
    return Row(where, values)
