"""Strict pydantic models, and TOML files that are read into them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cclip_deploy.common.limits import LARGEST_TOML, MOST_KEY_PARTS
from cclip_deploy.common.paths import read_text
from cclip_deploy.errors import CclipError, DataError, UsageError

Model = TypeVar("Model", bound=BaseModel)
_LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){{{MOST_KEY_PARTS}}}""")


class StrictModel(BaseModel):
    """Immutable pydantic model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_toml(
    path: Path, model: type[Model], missing: str = "", remedy: str = "", overrides: Mapping[str, Any] | None = None
) -> Model:
    """Read and validate a TOML file.

    Args:
        path: file to read.
        model: what it is validated as.
        missing: message of the DataError if the file does not exist.
        remedy: sentence that is added to the message if a key is wrong.
        overrides: values that replace those of the file before it is validated.

    Raises:
        DataError: the file does not exist.
        UsageError: the file is not TOML, or has an unknown, missing or invalid key.
    """
    if missing and not _exists(path):
        raise DataError(missing)
    values = read_document(path, UsageError)
    try:
        return model.model_validate(values | dict(overrides or {}))
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error)}.{remedy}") from error


def read_document(path: Path, error: type[CclipError] = DataError) -> dict[str, Any]:
    """Return the values of a TOML file; raise `error` if it is not TOML, too large or nested too deeply."""
    text = read_text(path, "TOML file", LARGEST_TOML, error)
    if _LONG_KEY.search(text):
        raise error(f"{path} is not a TOML file: a key has more than {MOST_KEY_PARTS} parts. Correct it.")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise error(f"{path} is not a TOML file: it is nested too deeply. Correct it.") from None
    except ValueError as problem:
        raise error(f"{path} is not a TOML file: {problem}.") from problem


def faults_of(error: ValidationError) -> str:
    """Format validation errors as `films.rho: …; arms: …`."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())


def _exists(path: Path) -> bool:
    """Return whether a path exists; True if the operating system rejects it, so that reading it raises."""
    try:
        return path.exists()
    except OSError:
        return True
