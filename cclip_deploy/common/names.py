"""Text that came from file names, in a form that every output can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def printable(text: str | Path) -> str:
    r"""Text as valid Unicode: a byte of a file name that is not UTF-8 becomes `\udcXX`, as on standard error.

    Python keeps such a byte as a lone surrogate, which neither UTF-8 nor a strict JSON parser takes.
    """
    return str(text).encode(errors="backslashreplace").decode()


def json_text(value: Any, indent: int | None = 1) -> str:
    """One JSON document in ASCII, ended by a newline, every text of it `printable`."""
    return json.dumps(_printable_in(value), indent=indent) + "\n"


def _printable_in(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key) if isinstance(key, str) else key: _printable_in(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_printable_in(held) for held in value]
    return value
