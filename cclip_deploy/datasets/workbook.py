"""Read the first sheet of an Excel workbook (ECMA-376) as text, with limits that are checked while parsing.

General readers create objects for every XML element and fill in missing rows and columns, so a workbook of 42 kB can
take gigabytes of memory. This reader stores only the texts of cells.
"""

from __future__ import annotations

import itertools
import posixpath
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from xml.parsers import expat

from cclip_deploy.common.limits import LARGEST_TABLE, LONGEST_CELL, MOST_CELLS, MOST_ELEMENTS, MOST_ROWS
from cclip_deploy.errors import DataError

MOST_PARTS = 10_000
"""Files in a workbook's archive."""
_BLOCK = 1 << 16
_COLUMN = re.compile(r"([A-Z]{1,3})([0-9]{1,10})")
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")

Attributes = Mapping[str, str]


def read_sheet(table: Path) -> list[list[str]]:
    """Return the rows of the first sheet, cells as stripped text; formulas give their last saved value.

    Omitted rows and columns are returned as empty; empty cells at the end of a row are dropped. Numbers are returned as
    stored, so dates are serial numbers.

    Raises:
        DataError: the file exceeds a limit on bytes, rows, cells or characters.
        Exception: the file is not a workbook or has too many elements; anything that `zipfile` and `expat` raise.
    """
    with zipfile.ZipFile(table) as archive:
        _check_archive(table, archive)
        book = _relations(archive, "")["officeDocument"][0][1]
        parts = _relations(archive, book)
        shared = _Shared(table)
        for _, part in parts["sharedStrings"][:1]:
            _parse(archive, part, shared)
        sheet = _Sheet(table, shared.strings)
        _parse(archive, dict(parts["worksheet"])[_first_sheet_id(archive, book)], sheet)
        return sheet.rows


def _check_archive(table: Path, archive: zipfile.ZipFile) -> None:
    parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    if unpacked > LARGEST_TABLE or len(parts) > MOST_PARTS:
        raise DataError(
            f"{table} unpacks to {unpacked:,} bytes in {len(parts):,} files; the limits are {LARGEST_TABLE:,} bytes "
            f"and {MOST_PARTS:,} files. Save it as CSV (UTF-8)."
        )
    if any(part.compress_type not in _COMPRESSIONS or part.flag_bits & 1 for part in parts):
        raise DataError(f"{table} is encrypted or compressed in an unusual way. Save it again as .xlsx, or as CSV.")


class _Handler:
    """Base of XML handlers, called with local element names."""

    def start(self, name: str, attributes: Attributes) -> None: ...

    def text(self, text: str) -> None: ...

    def end(self, name: str) -> None: ...


class _Texts(_Handler):
    """Collect the text of `<t>` and `<v>` in one element, without phonetic hints, up to LONGEST_CELL characters."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.letters: list[str] = []
        self._open = self._phonetic = False
        self._count = 0

    def clear(self) -> None:
        self.letters, self._count = [], 0

    def start(self, name: str, attributes: Attributes) -> None:
        if name == "rPh":
            self._phonetic = True
        self._open = name in ("t", "v") and not self._phonetic

    def text(self, text: str) -> None:
        if self._open:
            self._count += len(text)
            if self._count > LONGEST_CELL:
                raise DataError(f"{self.table} has a cell of more than {LONGEST_CELL:,} characters. Shorten it.")
            self.letters.append(text)

    def end(self, name: str) -> None:
        self._open = False
        if name == "rPh":
            self._phonetic = False

    def joined(self) -> str:
        return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), "".join(self.letters)).strip()


class _Shared(_Texts):
    """Collect the shared strings of a workbook, in order."""

    def __init__(self, table: Path) -> None:
        super().__init__(table)
        self.strings: list[str] = []

    def start(self, name: str, attributes: Attributes) -> None:
        super().start(name, attributes)
        if name == "si":
            self.clear()

    def end(self, name: str) -> None:
        super().end(name)
        if name == "si":
            self.strings.append(self.joined())


class _Sheet(_Texts):
    """Collect the rows of a sheet."""

    def __init__(self, table: Path, shared: list[str]) -> None:
        super().__init__(table)
        self.rows: list[list[str]] = []
        self._shared = shared
        self._cells = self._column = 0
        self._type = ""

    def start(self, name: str, attributes: Attributes) -> None:
        super().start(name, attributes)
        if name == "row":
            self._open_row(int(attributes.get("r", len(self.rows) + 1)))
        elif name == "c":
            self.clear()
            self._type = attributes.get("t", "n")
            place = _COLUMN.fullmatch(attributes.get("r", ""))
            self._column = self._column + 1 if place is None else _column_number(place[1])

    def end(self, name: str) -> None:
        super().end(name)
        if name == "c" and (value := self._value()):
            row = self.rows[-1]
            missing = self._column - len(row) - 1
            self._cells += missing + 1
            if self._cells > MOST_CELLS or missing < 0:
                raise _too_many(self.table)
            row.extend([""] * missing)
            row.append(value)

    def _open_row(self, number: int) -> None:
        if not len(self.rows) < number <= MOST_ROWS:
            raise DataError(
                f"{self.table} has a row {number:,} after row {len(self.rows):,}; rows must be in order, up to "
                f"{MOST_ROWS:,}. Delete everything below the table, or save it as CSV (UTF-8)."
            )
        self.rows.extend([] for _ in range(number - len(self.rows)))
        self._column = 0

    def _value(self) -> str:
        text = self.joined()
        if self._type == "s" and text:
            return self._shared[int(text)]
        if self._type == "n" and any(mark in text for mark in ".eE"):
            return str(float(text))
        return {"1": "TRUE", "0": "FALSE"}.get(text, text) if self._type == "b" else text


def _too_many(table: Path) -> DataError:
    return DataError(
        f"{table} has more than {MOST_CELLS:,} cells, or cells out of order. Delete unused cells, or save it as CSV "
        "(UTF-8)."
    )


def _column_number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number


class _Found(_Handler):
    """Collect the attributes of the first MOST_PARTS elements of one name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[Attributes] = []

    def start(self, name: str, attributes: Attributes) -> None:
        if name == self.name and len(self.found) < MOST_PARTS:
            self.found.append(attributes)


def _relations(archive: zipfile.ZipFile, part: str) -> dict[str, list[tuple[str, str]]]:
    """Return (id, target) of each relation of a part ("" is the package), by the last word of the relation's type."""
    folder, name = posixpath.split(part)
    reader = _Found("Relationship")
    _parse(archive, posixpath.join(folder, "_rels", f"{name}.rels"), reader)
    found: dict[str, list[tuple[str, str]]] = {"officeDocument": [], "worksheet": [], "sharedStrings": []}
    for relation in reader.found:
        target = posixpath.normpath(posixpath.join("/", folder, relation["Target"])).lstrip("/")
        found.setdefault(relation["Type"].rpartition("/")[2], []).append((relation["Id"], target))
    return found


def _first_sheet_id(archive: zipfile.ZipFile, book: str) -> str:
    reader = _Found("sheet")
    _parse(archive, book, reader)
    return next(value for name, value in reader.found[0].items() if name.rpartition(":")[2] == "id")


def _parse(archive: zipfile.ZipFile, part: str, handler: _Handler) -> None:
    parser = expat.ParserCreate(namespace_separator=":")
    parser.buffer_text = True
    elements = itertools.count(1)

    def start(name: str, attributes: Attributes) -> None:
        if next(elements) > MOST_ELEMENTS:
            raise ValueError(f"it has more than {MOST_ELEMENTS:,} XML elements in {part}")
        handler.start(name.rpartition(":")[2], attributes)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: handler.end(name.rpartition(":")[2])
    parser.CharacterDataHandler = handler.text
    parser.StartDoctypeDeclHandler = _refuse_document_type
    with archive.open(part) as file:
        while block := file.read(_BLOCK):
            parser.Parse(block)
    parser.Parse(b"", True)


def _refuse_document_type(*_: object) -> None:
    raise ValueError("it has a document type declaration, which workbooks never have")
