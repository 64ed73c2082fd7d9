"""Kept measurements, and how their numbers are written."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class NotMeasured(Exception):
    """A measurement that no file holds."""


@dataclass(frozen=True)
class Measurements:
    """The folder docs/measurements."""

    folder: Path

    def read(self, name: str) -> Any:
        """The contents of a JSON or TOML file; NotMeasured if there is none."""
        path = self.folder / name
        if not path.is_file():
            raise NotMeasured(f"Not measured yet: docs/measurements/{name} is missing.")
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; the columns numbered in `right` are aligned to the right."""
    rule = ["---:" if number in right else "---" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def decimals(value: float, significant: int = 3) -> int:
    """How many decimals show a number with that many significant digits; none above them."""
    return max(0, significant - 1 - math.floor(math.log10(abs(value)))) if value else significant - 1


def shown(value: float, unit: str = "", digits: int | None = None) -> str:
    """`3.42`, `10.2`, `149`: three significant digits unless `digits` gives the decimals."""
    return f"{value:,.{decimals(value) if digits is None else digits}f}{unit}"


def with_interval(
    value: float | None, low: float | None, high: float | None, unit: str = "", digits: int | None = None
) -> str:
    """`3.42 × [2.95, 3.54]`, the number alone where it has no interval, a dash where there is none."""
    if value is None:
        return "–"
    digits = decimals(value) if digits is None else digits
    if low is None or high is None:
        return shown(value, unit, digits)
    return f"{shown(value, unit, digits)} [{low:,.{digits}f}, {high:,.{digits}f}]"
