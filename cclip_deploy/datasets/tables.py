"""Read CSV, Excel and JSON Lines tables into rows of text; delimiter, encoding and columns are detected."""

from __future__ import annotations

import csv
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from cclip_deploy.common.json_file import parse_json
from cclip_deploy.common.limits import LARGEST_TABLE, LONGEST_LINE, MOST_CELLS, MOST_ROWS
from cclip_deploy.common.paths import check_regular_file
from cclip_deploy.datasets.columns import find_columns, looks_like_header
from cclip_deploy.datasets.encoding import describe_encoding, find_encoding
from cclip_deploy.datasets.options import DELIMITERS, DETECTED, DataSetOptions
from cclip_deploy.datasets.workbook import read_sheet
from cclip_deploy.errors import DataError

TEXT_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
WORKBOOK_SUFFIX, JSON_LINES_SUFFIX = ".xlsx", ".jsonl"
_SHOWN = 60
ENCODING_ADVICE = "Give its encoding with --encoding (data.encoding in a recipe), or save it as UTF-8."


@dataclass(frozen=True)
class Row:
    """One row; `where` is the table and row number for messages, counted like a spreadsheet (the header is row 1)."""

    where: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class TableFormat:
    """How a table was read.

    Attributes:
        table: path of the file.
        encoding: name of the encoding; None for workbooks.
        delimiter: delimiter of the columns; None for workbooks and JSON Lines.
        columns: column of each role that was found.
        unused_columns: the other columns.
    """

    table: str
    encoding: str | None
    delimiter: str | None
    columns: Mapping[str, str]
    unused_columns: tuple[str, ...]

    def describe(self) -> str:
        """Format as text: `table.csv: UTF-8, semicolon; image from Image, prompt from Caption; not used: age`."""
        names = {character: name for name, character in DELIMITERS.items()}
        kind = [part for part in (self.encoding, names.get(self.delimiter or "", self.delimiter)) if part]
        roles = ", ".join(f"{role} from {column!r}" for role, column in self.columns.items())
        unused = f"; not used: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        return f"{Path(self.table).name}: {', '.join(kind) or 'Excel workbook'}; {roles}{unused}"


def read_table(table: Path, options: DataSetOptions = DETECTED) -> list[Row]:
    """Read the rows of a .csv, .tsv, .txt, .xlsx or .jsonl file; JSON Lines rows are numbered by line, from 1.

    Raises:
        DataError: the table cannot be read, is too large, has no rows, or may have several encodings or delimiters.
    """
    return _read(table, options)[0]


def read_roles(
    table: Path, roles: Mapping[str, bool], options: DataSetOptions = DETECTED
) -> tuple[list[Row], TableFormat]:
    """Read a table into rows whose values are stripped texts by role; other columns are ignored.

    Args:
        table: file of any of the supported formats.
        roles: roles to read, and whether each is required (see `columns.CANONICAL`).
        options: chosen columns, encoding and delimiter.

    Raises:
        DataError: see `read_table` and `columns.find_columns`, or a value of JSON Lines is not a text.
    """
    rows, encoding, delimiter = _read(table, options)
    found: dict[tuple[str, ...], dict[str, str]] = {}
    chosen: list[Row] = []
    for row in rows:
        header = tuple(row.values)
        if header not in found:
            where = row.where if table.suffix.lower() == JSON_LINES_SUFFIX else f"{table}, row 1"
            found[header] = find_columns(where, header, roles, options.columns)
        values = {role: _text(row, column).strip() for role, column in found[header].items()}
        chosen.append(Row(row.where, values))
    columns = {role: column for mapping in reversed(found.values()) for role, column in mapping.items()}
    unused = dict.fromkeys(name for header in found for name in header if name and name not in columns.values())
    shown = None if encoding is None else describe_encoding(encoding)
    return chosen, TableFormat(str(table), shown, delimiter, columns, tuple(unused))


def has_known_header(table: Path) -> bool:
    """Return whether a text file begins with a header that names an image, a mask and a prompt."""
    try:
        encoding = find_encoding(table)
        separator, skipped = _find_delimiter(table, encoding)
        with table.open(newline="", encoding=encoding) as file:
            return looks_like_header(next(_records(table, file, separator or ",", skipped), []))
    except (OSError, UnicodeDecodeError, csv.Error, DataError):
        return False


def _text(row: Row, column: str) -> str:
    value: Any = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} is {reprlib.repr(value)}; expected a text. Put it in quotes.")
    return value


def _read(table: Path, options: DataSetOptions) -> tuple[list[Row], str | None, str | None]:
    """Return the rows of a table, its encoding and its delimiter."""
    check_regular_file(table, "table", DataError, LARGEST_TABLE)
    suffix = table.suffix.lower()
    if suffix == WORKBOOK_SUFFIX:
        return _read_xlsx(table), None, None
    encoding = options.encoding or find_encoding(table)
    try:
        if suffix == JSON_LINES_SUFFIX:
            return _read_json_lines(table, encoding), encoding, None
        separator, skipped = _find_delimiter(table, encoding, options.separator)
        if separator is None:
            raise DataError(
                f"{table} may be separated in several ways. Give the delimiter with --delimiter "
                f"{' or --delimiter '.join(DELIMITERS)} (data.delimiter in a recipe)."
            )
        with table.open(newline="", encoding=encoding) as file:
            lines = list(_records(table, file, separator, skipped))
    except UnicodeError as error:
        raise DataError(f"{table} cannot be read in the encoding {encoding}: {error}. {ENCODING_ADVICE}") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a CSV table: {error}. Save it again as CSV, UTF-8.") from error
    return _make_rows(table, lines, "Quote texts that hold the delimiter."), encoding, separator


def _find_delimiter(table: Path, encoding: str, chosen: str | None = None) -> tuple[str | None, int]:
    """Return the delimiter, None if several would do, and the number of lines before the header.

    The delimiter is the chosen one, what Excel's line `sep=;` says, or the one that divides the header. If several do,
    it is the one for which every row has as many fields as the header.
    """
    with table.open(newline="", encoding=encoding) as file:
        start = file.readline(LONGEST_LINE).strip('\r\n"')
    if len(start) == 5 and start.lower().startswith("sep="):
        return chosen or start[4], 1
    if chosen is not None:
        return chosen, 0
    headers = {mark: _first_widths(table, encoding, mark, 1) for mark in DELIMITERS.values()}
    dividing = [mark for mark, widths in headers.items() if widths and widths[0] > 1]
    if not dividing and any(headers.values()):
        raise DataError(
            f"{table} has one column, {start[:_SHOWN]!r}. Give the delimiter with --delimiter, such as --delimiter "
            "semicolon or --delimiter '~' (data.delimiter in a recipe)."
        )
    if len(dividing) > 1:
        regular = [mark for mark in dividing if len(set(_first_widths(table, encoding, mark, MOST_ROWS))) == 1]
        dividing = regular if len(regular) == 1 else dividing
    return (dividing[0] if len(dividing) == 1 else None) if dividing else ",", 0


def _first_widths(table: Path, encoding: str, separator: str, count: int) -> list[int]:
    """Return the numbers of fields of the first records that are not empty; none if the file is not such a table."""
    try:
        with table.open(newline="", encoding=encoding) as file:
            return [len(line) for line in islice(filter(any, _records(table, file, separator, 0)), count)]
    except csv.Error:
        return []


def _records(table: Path, file: TextIO, separator: str, skipped: int) -> Iterator[list[str]]:
    lines = islice(_limited_lines(table, file, separator), skipped, None)
    return csv.reader(lines, delimiter=separator, skipinitialspace=separator != " ", strict=True)


def _limited_lines(table: Path, file: TextIO, separator: str = ",") -> Iterator[str]:
    """Yield the lines of a table; raise DataError for a line that is too long, or too many lines or delimiters."""
    separators = 0
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
        separators += line.count(separator)
        if len(line) > LONGEST_LINE:
            raise DataError(f"{table}, line {number} has more than {LONGEST_LINE:,} characters. Split it.")
        if number > MOST_ROWS or separators > MOST_CELLS:
            raise DataError(f"{table} exceeds the limit of {MOST_ROWS:,} lines or {MOST_CELLS:,} delimiters. Split it.")
        if "\0" in line:
            raise DataError(f"{table}, line {number} has a zero character, so it is not text. {ENCODING_ADVICE}")
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
    """Return the rows below the header; empty rows are skipped, and empty fields beyond the header dropped."""
    filled = [(number, line) for number, line in enumerate(lines, 1) if any(line)]
    if len(filled) < 2:
        raise DataError(f"{table} is empty; it needs a header and at least one row.")
    header = [name.strip() for name in filled[0][1]]
    for name, count in Counter(header).items():
        if name and count > 1:
            raise DataError(f"{table}, row 1: column {name!r} is repeated. Keep one.")
    rows: list[Row] = []
    for number, line in filled[1:]:
        fields = line if len(line) <= len(header) or any(line[len(header) :]) else line[: len(header)]
        if len(fields) != len(header):
            raise DataError(f"{table}, row {number} has {len(fields)} fields, the header {len(header)}. {advice}")
        rows.append(Row(f"{table}, row {number}", dict(zip(header, fields, strict=True))))
    return rows


def _read_json_lines(table: Path, encoding: str) -> list[Row]:
    with table.open(encoding=encoding) as file:
        rows = [
            _read_json_line(f"{table}, row {number}", line)
            for number, line in enumerate(_limited_lines(table, file), 1)
            if line.strip()
        ]
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
    return Row(where, values)
