"""Find the character encoding of a text table."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cclip_deploy.errors import DataError

UTF_8, WINDOWS = "utf-8-sig", "cp1252"
_MARKS = {codecs.BOM_UTF8: UTF_8, codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BLOCK = 2**16
_LETTER = "A-Za-zÀ-ÖØ-öø-ÿŠŒŽšœžŸ"
_DOUBTFUL = re.compile(
    f"[{_LETTER}][^\\x00-\\x7f{_LETTER}’‘–—·\\xa0\\xad][{_LETTER}]"  # a symbol between letters
    f"|[¼½¾¹²³¤¦¨¬¯´¸¢¥¶][{_LETTER}]"  # a fraction or mark before a letter
    "|[À-ÖØ-öø-ÿŠŒŽšœžŸ]{3}"  # three letters with accents in a row
    "|[a-zß-öø-ÿ][À-ÖØ-ÞŠŒŽŸ]"  # a capital after a small letter
    "|[ÃÂ][^\\w\\s]"  # UTF-8 that was read as Windows-1252
)
"""Text that Western languages do not have: it was written in another 8-bit encoding, such as cp1251 or Mac Roman."""


def find_encoding(table: Path) -> str:
    """Return the encoding of a text file.

    A byte-order mark decides. Without one, the file is UTF-16 if its second or first byte is zero, UTF-8 if it is valid
    UTF-8, and otherwise Windows-1252, which contains Latin-1, if the text could be Western European.

    Raises:
        DataError: the file cannot be read, or may be in one of several encodings.
    """
    try:
        with table.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{table} cannot be read: {error.strerror}. Check its permissions.") from error
    marked = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
    if marked is not None:
        return marked
    if len(start) >= 2 and 0 in start[:2]:
        return "utf-16-le" if start[0] else "utf-16-be"
    if _first_failure(table, UTF_8) is None:
        return UTF_8
    doubt = _first_failure(table, WINDOWS) or _first_doubtful(table)
    if doubt is not None:
        raise DataError(
            f"{table} is not UTF-8, and its text is not clearly Western European ({doubt}). Give its encoding with "
            "--encoding, such as cp1250, cp1251, mac-roman, shift-jis or cp1252 (data.encoding in a recipe), or save "
            "it as UTF-8."
        )
    return WINDOWS


def describe_encoding(encoding: str) -> str:
    """Return the name of a detected encoding for reports."""
    names = {UTF_8: "UTF-8", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", WINDOWS: "Windows-1252"}
    return names.get(encoding, encoding)


def _first_failure(table: Path, encoding: str) -> str | None:
    try:
        with table.open(encoding=encoding, newline="") as file:
            for _ in _blocks(file):
                pass
    except UnicodeDecodeError as error:
        return f"byte 0x{error.object[error.start]:02x}"
    return None


def _first_doubtful(table: Path) -> str | None:
    """Return where the text of a Windows-1252 file is not that of a Western language, for a message."""
    tail = ""
    with table.open(encoding=WINDOWS, newline="") as file:
        for block in _blocks(file):
            text = tail + block
            if found := _DOUBTFUL.search(text):
                excerpt = text[max(0, found.start() - 10) : found.end() + 10].split("\n")
                part = next(line for line in excerpt if _DOUBTFUL.search(line))
                return f"{part.strip()!r} as Windows-1252"
            tail = text[-3:]
    return None


def _blocks(file: TextIO) -> Iterator[str]:
    return iter(lambda: file.read(_BLOCK), "")
