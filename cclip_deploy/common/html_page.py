"""Reports as an HTML page with sections of text, tiles, tables and figures.

Figures are separate files or, as data URIs, part of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #16202a; --soft: #5b6875; --line: #dfe5ea; --good: #11734a; --bad: #b3261e; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #f6f8f9; margin: 0; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 52rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); width: 100%; }
th, td { padding: .45rem .8rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); background: #fbfcfd; border-top: 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.1rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); } figure img { width: 100%; display: block; }
figcaption { padding: .55rem .8rem; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: #fff; border: 1px solid var(--line); padding: .8rem 1rem; }
figure img[src^="data:image/svg"] { padding: .6rem .5rem 0; box-sizing: border-box; }
.tile span:first-child { min-height: 3.2em; } .tile b { font-size: 1.55rem; display: block; }
.tile span { color: var(--soft); font-size: .85rem; display: block; font-variant-numeric: tabular-nums; }
code { background: #eceff2; padding: .1rem .3rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table; a cell is text or a bool, shown as yes or no. `numbers` are the indices of right-aligned columns."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | bool, ...], ...]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """An image, by its path relative to the page or as a data URI, with its caption."""

    source: str
    caption: str


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
    tiles: tuple[Tile, ...] = ()
    table: Table | None = None
    figures: tuple[Figure, ...] = ()


def write_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the HTML of a page; all text is escaped."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body><main><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p>\n{body}\n</main></body></html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"] if section.title else []
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.tiles:
        parts.append(f'<div class="tiles">{"".join(_tile(tile) for tile in section.tiles)}</div>')
    if section.table is not None:
        parts.append(_table(section.table))
    if section.figures:
        figures = "\n".join(
            f'<figure><img src="{escape(figure.source)}" alt="{escape(figure.caption)}">'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
            for figure in section.figures
        )
        parts.append(f'<div class="pictures">{figures}</div>')
    return "\n".join(parts)


def _tile(tile: Tile) -> str:
    name, value, below = escape(tile.name), escape(tile.value), escape(tile.below)
    return f'<div class="tile"><span>{name}</span><b>{value}</b><span>{below}</span></div>'


def _table(table: Table) -> str:
    numbers = [' class="number"' if index in table.numbers else "" for index in range(len(table.head))]
    head = "".join(f"<th{number}>{escape(cell)}</th>" for cell, number in zip(table.head, numbers, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(_cell(cell, index in table.numbers) for index, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(cell: str | bool, number: bool) -> str:
    if isinstance(cell, bool):
        return '<td class="good">yes</td>' if cell else '<td class="bad">no</td>'
    return f'<td class="number">{escape(cell)}</td>' if number else f"<td>{escape(cell)}</td>"
