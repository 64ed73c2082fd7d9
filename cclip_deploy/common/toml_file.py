"""Strict pydantic models, and TOML files that are read into them."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

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
        overrides: values that replace those of the file, table by table, before it is validated.

    Raises:
        DataError: the file does not exist.
        UsageError: the file is not TOML, or has an unknown, missing or invalid key.
    """
    if missing and not _exists(path):
        raise DataError(missing)
    values = read_document(path, UsageError)
    try:
        return model.model_validate(merge(values, overrides or {}))
    except ValidationError as error:
        raise UsageError(f"{path}: {faults_of(error, model)}.{remedy}") from error


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base` recursively."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return the nested values of settings such as `game.masker_steps=2`; a value that is not TOML is a string.

    Raises:
        UsageError: a setting has no key or no equals sign.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not all(part.strip() for part in key.split(".")):
            raise UsageError(f"{setting!r} is not a setting. Give KEY=VALUE, such as game.masker_steps=2.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        for part in reversed(key.split(".")):
            value = {part.strip(): value}
        values = merge(values, value)
    return values


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


def faults_of(error: ValidationError, model: type[BaseModel]) -> str:
    """Format the validation errors of a model as `films.rho: …; arms: …`; suggest the nearest for an unknown key."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: "
        + (_unknown_key(model, e["loc"]) if e["type"] == "extra_forbidden" else e["msg"].lower())
        for e in error.errors()
    )


def _unknown_key(model: type[BaseModel], place: Sequence[int | str]) -> str:
    """Describe an unknown key: the keys of the same table that it resembles, and where else a key of this name is."""
    keys, name = keys_of(model), str(place[-1])
    table = "".join(f"{part}." for part in place[:-1])
    beside = [key.removeprefix(table) for key in keys if key.startswith(table) and "." not in key.removeprefix(table)]
    similar = difflib.get_close_matches(name, beside, n=1)
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    found = [table + key for key in similar] or elsewhere
    return f"unknown key (did you mean {found[0]}?)" if found else "unknown key"


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of a model and of the models in it, by dotted key."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        for inner in models_in(field.annotation):
            found |= keys_of(inner, f"{prefix}{name}.")
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in a field's type, such as that of `Films | None`."""
    parts = (annotation, *get_args(annotation))
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _exists(path: Path) -> bool:
    """Return whether a path exists; True if the operating system rejects it, so that reading it raises."""
    try:
        return path.exists()
    except OSError:
        return True
