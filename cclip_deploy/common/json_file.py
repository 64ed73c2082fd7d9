"""Read and write JSON documents, with limits on their size and depth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cclip_deploy.common.files import whole_file
from cclip_deploy.common.limits import LARGEST_JSON, MOST_JSON_VALUES
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import read_text
from cclip_deploy.errors import DataError


def read_json(path: Path) -> Any:
    """Return the JSON document of a file.

    Raises:
        DataError: the file is not a regular file, too large, not JSON, or nested too deeply.
    """
    return parse_json(read_text(path, "JSON file", LARGEST_JSON), str(path))


def parse_json(text: str, where: str, **options: Any) -> Any:
    """Parse JSON with the options of `json.loads`.

    Raises:
        DataError: the text is not JSON or holds too many values; the message names `where`.
    """
    if sum(text.count(mark) for mark in "[{,") > MOST_JSON_VALUES:
        raise DataError(f"{where} holds more than {MOST_JSON_VALUES:,} JSON values. Split it.")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise DataError(f"{where} cannot be read as JSON: it is nested too deeply. Restore or correct it.") from None
    except ValueError as problem:
        raise DataError(f"{where} cannot be read as JSON: {problem}. Restore or correct it.") from problem


def json_text(value: Any, indent: int | None = 1) -> str:
    """Return a JSON document in ASCII with a final newline; every string in it is made `printable`."""
    return json.dumps(_printable_in(value), indent=indent) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically.

    Raises:
        EnvironmentIssue: the file cannot be written.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(value), encoding="utf-8")


def _printable_in(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key) if isinstance(key, str) else key: _printable_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable_in(item) for item in value]
    return value
