"""Rows of CSV, Excel and JSON Lines tables as text by column, with the numbers that messages name them by."""

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
    """One row; `where` says table and number, the header being row 1, as a spreadsheet shows it."""

    where: str
    values: dict[str, str]


def read_table(table: Path) -> list[Row]:
    """The rows of a .csv, .xlsx or .jsonl file; DataError if it cannot be read, is too large, or has none.

    In JSON Lines every line is one object and its own row; numbers count lines from 1.
    """
    check_regular_file(table, "table", DataError, LARGEST_TABLE)
    readers = {".xlsx": _read_xlsx, ".jsonl": _read_json_lines}
    return readers.get(table.suffix.lower(), _read_csv)(table)


def read_described(
    table: Path, name_column: str = "Image", text_column: str = "Description"
) -> list[tuple[Row, str, str]]:
    """Rows with a file's name and a text, from the two columns whatever their case; other columns are passed over.

    Raises:
        DataError: a column is missing, a field empty, or a name stands in two rows.
    """
    found: list[tuple[Row, str, str]] = []
    seen: dict[str, str] = {}
    for row in read_table(table):
        values = {column.lower(): value.strip() for column, value in row.values.items()}
        for column in (name_column, text_column):
            if column.lower() not in values:
                held = ", ".join(column for column in row.values if column)
                raise DataError(f"{table} has no column {column!r}; there are {held}. Add or rename it.")
            if not values[column.lower()]:
                raise DataError(f"{row.where}: {column} is empty. Fill it in, or remove the row.")
        name = values[name_column.lower()]
        first = seen.setdefault(name, row.where)
        if first != row.where:
            raise DataError(
                f"{row.where}: {name} stands in {first} too, and this layout has one text a mask. Keep one."
            )
        found.append((row, name, values[text_column.lower()]))
    return found


def _read_csv(table: Path) -> list[Row]:
    """A byte-order mark of a spreadsheet program is passed over."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(_limited_lines(table, file), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{table} cannot be read as a CSV table in UTF-8: {error}. Save it again as CSV, UTF-8."
        ) from error
    return _make_rows(table, lines, "Quote texts that hold commas.")


def _limited_lines(table: Path, file: TextIO) -> Iterator[str]:
    """The lines of a table; DataError where one is too long, or where they are too many or have too many commas."""
    commas = 0
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
        commas += line.count(",")
        if len(line) > LONGEST_LINE:
            raise DataError(f"{table}, line {number} has more than {LONGEST_LINE:,} characters. Split it.")
        if number > MOST_ROWS or commas > MOST_CELLS:
            raise DataError(
                f"{table} has more than {MOST_ROWS:,} lines or {MOST_CELLS:,} commas; so many are read. Split it."
            )
        yield line


def _read_xlsx(table: Path) -> list[Row]:
    """The first sheet; formulas count as the values that were last saved with them."""
    try:
        lines = read_sheet(table)
    except DataError:
        raise
    except Exception as error:  # whatever zipfile and the XML parser raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{table} cannot be read as an Excel workbook: {reason}. Save it again as .xlsx, or as CSV in UTF-8."
        ) from error
    width = max((len(line) for line in lines), default=0)
    if width * len(lines) > MOST_CELLS:
        raise DataError(
            f"{table} has {len(lines):,} rows and {width:,} columns, more than {MOST_CELLS:,} cells. Delete what lies "
            "outside the table, or save it as CSV (UTF-8)."
        )
    return _make_rows(table, [line + [""] * (width - len(line)) for line in lines], "Fill the header's cells.")


def _make_rows(table: Path, lines: Sequence[Sequence[str]], advice: str) -> list[Row]:
    filled = list(lines)
    while filled and not any(filled[-1]):
        filled.pop()
    if len(filled) < 2:
        raise DataError(f"{table} is empty: a header and at least one row are expected.")
    header = [name.strip() for name in filled[0]]
    for name, count in Counter(header).items():
        if name and count > 1:
            raise DataError(f"{table}, row 1: column {name!r} stands there twice. Keep one.")
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
        raise DataError(f"{table} is empty: at least one line with an object is expected.")
    return rows


def _read_json_line(where: str, line: str) -> Row:
    def keep_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise DataError(f"{where}: {name!r} stands there twice. Keep one.")
        return dict(pairs)

    values = parse_json(line, where, object_pairs_hook=keep_once)
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}, where an object with image, mask and text is expected.")
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {reprlib.repr(value)}, where a text is expected. Put it in quotes.")
    return Row(where, values)
