"""Reports as an HTML page with sections of text, tiles, tables and figures.

Figures are separate files or, as data URIs, part of the page. The page needs no other file and no network. It has a
dark form, and on a narrow screen wide tables scroll in their frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cclip_deploy import __version__
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.names import printable

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Table:
    """A table; a cell is text or a bool, shown as yes or no. `numbers` are the indices of right-aligned columns."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | bool, ...], ...]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """An image, by its path relative to the page or as a data URI.

    `alt` describes it, by default as the caption; a `wide` one has the width of the page.
    """

    source: str
    caption: str
    alt: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline figure: name, value and a small line below, such as an interval."""

    name: str
    value: str
    below: str = ""

    @staticmethod
    def of(name: str, shown: str) -> Tile:
        """Make a tile from a value and its interval, such as `0.85 [0.84, 0.86]`."""
        value, _, below = shown.partition(" ")
        return Tile(name, value, below)


@dataclass(frozen=True)
class Section:
    """A section of the page; an empty title has no heading."""

    title: str
    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    table: Table | None = None
    figures: tuple[Figure, ...] = ()


def write_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the HTML of a page; all text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return printable(template.render(title=title, lead=lead, sections=sections, version=__version__)) + "\n"


def save_page(page: str, path: Path) -> None:
    """Write a page atomically; raise EnvironmentIssue if the file cannot be written."""
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
