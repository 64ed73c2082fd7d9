"""Options that say how a data-set folder is read."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cclip_deploy.datasets.columns import role_of
from cclip_deploy.datasets.mask_values import parse_mask_value
from cclip_deploy.errors import UsageError

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


@dataclass(frozen=True)
class DataSetOptions:
    """How data-set folders are read.

    Attributes:
        layout: one of LAYOUTS, for every folder; default: detected for each folder.
        subject_pattern: regular expression for the patient in an image's name.
        allow_outside: whether tables may name files outside the folder.
        columns: column of each role ("image", "mask", "prompt", "split", "patient"), where its name is not known or
            several are; an empty name says that the table has no such column.
        encoding: encoding of text tables, such as "cp1250"; default: detected.
        delimiter: delimiter of text tables, a name of DELIMITERS or one character; default: detected.
        table: file name of the table in the flat layout, if the folder has several.
        mask_values: values of mask files that are inside (see `mask_values`); default: all but 0, if there is only one.
    """

    layout: str | None = None
    subject_pattern: str | None = None
    allow_outside: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str | None = None
    delimiter: str | None = None
    table: str | None = None
    mask_values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UsageError if a column role, an encoding, a delimiter or a mask value is unknown."""
        for role in self.columns:
            role_of(role)
        if self.encoding is not None:
            _check_encoding(self.encoding)
        separator = self.separator
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise UsageError(
                f"The delimiter is {self.delimiter!r}; give {', '.join(DELIMITERS)}, or one character that is not a "
                "quote or line end."
            )
        for value in self.mask_values:
            parse_mask_value(value)

    @property
    def separator(self) -> str | None:
        """The delimiter as a character; None if it is to be detected."""
        return None if self.delimiter is None else DELIMITERS.get(self.delimiter.lower(), self.delimiter)


DETECTED = DataSetOptions()
"""Detects everything."""


def parse_columns(assignments: Iterable[str]) -> dict[str, str]:
    """Parse `ROLE=NAME` into {role: name}; raise UsageError for other forms, unknown roles and repeated roles."""
    columns: dict[str, str] = {}
    for assignment in assignments:
        written, equals, name = assignment.partition("=")
        if not equals:
            raise UsageError(f"--column {assignment!r} has no '='. Give ROLE=NAME, such as --column mask=label.")
        role = role_of(written)
        if role in columns:
            raise UsageError(f"--column names the {role} column twice: {columns[role]!r} and {name!r}. Give one.")
        columns[role] = name
    return columns


def _check_encoding(name: str) -> None:
    try:
        "".encode(name)
        codecs.lookup(name)
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"Unknown text encoding {name!r}. Encodings are those of Python, such as utf-8, utf-16, cp1252, cp1250, "
            "mac-roman or shift-jis."
        ) from error
