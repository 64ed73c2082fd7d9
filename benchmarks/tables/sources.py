"""Stored measurements, and formatting of their numbers."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class NotMeasured(Exception):
    """A measurement is missing."""


@dataclass(frozen=True)
class Measurements:
    """The folder docs/measurements."""

    folder: Path

    def read(self, name: str) -> Any:
        """Return the contents of a JSON or TOML file; raise NotMeasured if it does not exist."""
        path = self.folder / name
        if not path.is_file():
            raise NotMeasured(f"Not measured yet: docs/measurements/{name} is missing.")
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a Markdown table; the columns with the indices `right` are right-aligned."""
    rule = ["---:" if number in right else "---" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def decimals(value: float, significant: int = 3) -> int:
    """Return the number of decimals for a number of significant digits."""
    return max(0, significant - 1 - math.floor(math.log10(abs(value)))) if value else significant - 1


def shown(value: float, unit: str = "", digits: int | None = None) -> str:
    """Format a number with three significant digits, or with `digits` decimals: `3.42`, `10.2`, `149`."""
    return f"{value:,.{decimals(value) if digits is None else digits}f}{unit}"


def with_interval(
    value: float | None, low: float | None, high: float | None, unit: str = "", digits: int | None = None
) -> str:
    """Format `3.42 × [2.95, 3.54]`; without an interval the number alone, for None a dash."""
    if value is None:
        return "–"
    digits = decimals(value) if digits is None else digits
    if low is None or high is None:
        return shown(value, unit, digits)
    return f"{shown(value, unit, digits)} [{low:,.{digits}f}, {high:,.{digits}f}]"
