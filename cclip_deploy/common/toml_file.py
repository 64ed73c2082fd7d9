"""Strict pydantic models, and TOML files that are read into them or written from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cclip_deploy.common.paths import is_there
from cclip_deploy.common.paths import read_toml as read_document
from cclip_deploy.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


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
        missing: message of the UsageError if the file does not exist.
        remedy: sentence that is added to the message if a key is wrong.
        overrides: values that replace those of the file before it is validated.

    Raises:
        UsageError: the file does not exist, is not TOML, or has an unknown, missing or invalid key.
    """
    if not is_there(path):
        raise UsageError(missing or f"There is no file {path}. Check the path.")
    values = read_document(path, UsageError)
    try:
        return model.model_validate(values | dict(overrides or {}))
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error)}.{remedy}") from error


def faults_of(error: ValidationError) -> str:
    """Format validation errors as `films.rho: …; arms: …`."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
