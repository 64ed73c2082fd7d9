"""File names as valid Unicode text."""

from __future__ import annotations

from pathlib import Path


def printable(text: str | Path) -> str:
    r"""Return text as valid Unicode: a byte of a file name that is not UTF-8 becomes `\udcXX`.

    Python represents such a byte as a lone surrogate, which neither UTF-8 nor a strict JSON parser accepts.
    """
    return str(text).encode(errors="backslashreplace").decode()
