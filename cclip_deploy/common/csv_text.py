"""CSV tables that a spreadsheet program can open without running what a stranger wrote into a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

_STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_text(rows: Iterable[Sequence[object]], line_end: str = "\n") -> str:
    """Rows as CSV; a text that begins as a formula gets an apostrophe before it (OWASP, CSV Injection).

    Numbers stay numbers, negative ones too.
    """
    file = io.StringIO()
    csv.writer(file, lineterminator=line_end).writerows([harmless(cell) for cell in row] for row in rows)
    return file.getvalue()


def harmless(cell: object) -> object:
    """The cell, with an apostrophe before a text that a spreadsheet program would take for a formula."""
    if isinstance(cell, int | float):
        return cell
    text = str(cell)
    return f"'{text}" if text.startswith(_STARTS_FORMULA) else text
