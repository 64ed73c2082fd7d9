"""A TOML file read strictly into a pydantic model: whatever is wrong with it is said in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cclip_deploy.common.paths import is_there
from cclip_deploy.common.paths import read_toml as read_document
from cclip_deploy.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path, model: type[Model], absent: str, remedy: str = "") -> Model:
    """Read a file as `model`.

    Raises:
        UsageError: there is no file (`absent` is the message), it is no TOML file, or a key is unknown, missing or
            wrong.
    """
    if not is_there(path):
        raise UsageError(absent)
    values = read_document(path, UsageError)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error)}.{remedy}") from error


def faults_of(error: ValidationError) -> str:
    """Every key that is wrong, and how: `films.rho: …; arms: …`."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
