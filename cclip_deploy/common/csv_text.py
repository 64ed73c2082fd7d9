"""CSV output in which no cell is interpreted as a formula by a spreadsheet program."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

_STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_text(rows: Iterable[Sequence[object]], line_end: str = "\n") -> str:
    """Format rows as CSV; text that starts like a formula is prefixed with an apostrophe (OWASP, CSV Injection)."""
    file = io.StringIO()
    csv.writer(file, lineterminator=line_end).writerows([escape_formula(cell) for cell in row] for row in rows)
    return file.getvalue()


def escape_formula(cell: object) -> object:
    """Return a cell, with an apostrophe before text that starts like a formula; numbers are returned unchanged."""
    if isinstance(cell, int | float):
        return cell
    text = str(cell)
    return f"'{text}" if text.startswith(_STARTS_FORMULA) else text
