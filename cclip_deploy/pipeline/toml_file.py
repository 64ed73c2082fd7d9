"""A TOML file read strictly into a pydantic model: whatever is wrong with it is said in one sentence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cclip_deploy.errors import UsageError
from cclip_deploy.files import reading_problem

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path, model: type[Model], absent: str, remedy: str = "") -> Model:
    """Read a file as `model`.

    Raises:
        UsageError: a key is unknown, missing or wrong, or there is no file (`absent` is the message).
        DataError: the file cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(absent) from None
    except OSError as error:
        raise reading_problem(path, error) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}.") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error)}.{remedy}") from error


def faults_of(error: ValidationError) -> str:
    """Every key that is wrong, and how: `films.rho: …; arms: …`."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
