"""Marked regions of a Markdown page, and their contents from measurements.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, each on a line of its own; a number in a sentence
between `<!-- value: NAME -->` and `<!-- /value -->`. A table of words alone follows a line `<!-- words -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from benchmarks.tables.sources import Measurements, NotMeasured

Renderer = Callable[[Measurements], str]

TABLE = re.compile(r"(<!-- table: (?P<name>[^\n]+?) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (?P<name>[^\n]+?) -->)(?P<body>[^\n]*?)(<!-- /value -->)")
MARKER = re.compile(r"<!-- /?(?:table|value)\b")
WORDS = "<!-- words -->"
RULE = re.compile(r"\s*\|?[ :|-]*-[ :|-]*\|[ :|-]*")
MEASURED = re.compile(r"\d (?:ms|s|MB|GB|×|%)(?!\w)|±|\[[+−-]?\d")
"""Matches a number with the unit of a measurement, or an interval."""


@dataclass(frozen=True)
class Page:
    """A page of the documentation, with the renderers of its regions.

    Every renderer must be used on the page, and every region must have a renderer.
    """

    path: str
    tables: Mapping[str, Renderer]
    values: Mapping[str, Renderer]

    def render(self, text: str, measurements: Measurements) -> str:
        """Return the text of the page with every region rendered again.

        Raises:
            ValueError: a region without a renderer, a renderer without a region, or a marker without its partner.
            NotMeasured: a quoted value whose measurement is missing; a table says so in its place.
        """
        self._check_names(text)
        text = TABLE.sub(lambda found: _filled(found, _table(self.tables[found["name"]], measurements)), text)
        return VALUE.sub(lambda found: _filled(found, self.values[found["name"]](measurements)), text)

    def differences(self, text: str, measurements: Measurements) -> list[str]:
        """Return the kind and name of every region whose text differs from the measurements."""
        rendered = self.render(text, measurements)
        return [
            f"{kind} '{then['name']}'"
            for kind, pattern in (("table", TABLE), ("value", VALUE))
            for then, now in zip(pattern.finditer(text), pattern.finditer(rendered), strict=True)
            if then["body"] != now["body"]
        ]

    def _check_names(self, text: str) -> None:
        found = {"table": [m["name"] for m in TABLE.finditer(text)], "value": [m["name"] for m in VALUE.finditer(text)]}
        for kind, known in (("table", self.tables), ("value", self.values)):
            if wrong := set(found[kind]) ^ set(known):
                raise ValueError(f"{self.path}: {kind} {sorted(wrong)} has no renderer or is not on the page")
        if len(MARKER.findall(text)) != 2 * sum(map(len, found.values())):
            raise ValueError(f"{self.path}: a marker is misspelled or stands alone")


def unmarked_tables(text: str) -> list[str]:
    """Return the first line of every Markdown table that should be in a marked region.

    That is every table which does not follow `<!-- words -->`, and one that does but holds measured numbers.
    """
    lines, found = TABLE.sub("", text).splitlines(), []
    for number, line in enumerate(lines[1:], 1):
        if RULE.fullmatch(line):
            body = "\n".join(takewhile(lambda row: "|" in row, lines[number + 1 :]))
            if number < 2 or lines[number - 2].strip() != WORDS or MEASURED.search(body):
                found.append(lines[number - 1])
    return found


def _table(render: Renderer, measurements: Measurements) -> str:
    try:
        return render(measurements) + "\n"
    except NotMeasured as missing:
        return f"*{missing}*\n"


def _filled(found: re.Match[str], body: str) -> str:
    return f"{found[1]}{body}{found[4]}"
