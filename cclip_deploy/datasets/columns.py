"""Roles of table columns: their names in tables that people have, and the synonyms of splits."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence

from cclip_deploy.errors import DataError, UsageError

CANONICAL = {"image": "image", "mask": "mask", "prompt": "text", "split": "split", "patient": "subject"}
"""Column of each role in the tables that `synth` writes; it is taken before any alias."""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image_path", "image_file", "image_name", "image_filename", "images", "img", "img_path", "img_file", "img_name",
        "filename", "file", "file_name", "file_path", "path", "picture",
    ),
    "mask": (
        "mask_path", "mask_file", "mask_name", "mask_filename", "masks", "label", "label_path", "label_file", "labels",
        "gt", "gt_path", "ground_truth", "ground_truth_path", "segmentation", "segmentation_path", "seg", "seg_path",
        "annotation", "annotation_path",
    ),
    "prompt": (
        "prompt", "prompts", "description", "descriptions", "caption", "captions", "sentence", "sentences", "report",
        "phrase", "expression", "finding", "findings",
    ),
    "split": ("set", "subset", "partition", "phase"),
    "patient": ("patient", "patient_id", "subject_id", "participant", "participant_id"),
}  # fmt: skip
"""Other names of the columns; case, spaces, hyphens, dots and underscores do not matter."""
SPLIT_SYNONYMS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val", "development": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_CLOSE = 0.85
"""Similarity (`difflib`) from which an unused column is taken for a misspelled name."""


def role_of(name: str) -> str:
    """Return the role of a canonical or alias name: `caption` is "prompt"; raise UsageError if there is none."""
    found = _ROLES.get(_plain(name))
    if found is None:
        raise UsageError(f"Unknown column role {name!r}. Roles are {', '.join(CANONICAL)}.")
    return found


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" for a name such as `Training` or `dev`, or None."""
    return SPLIT_SYNONYMS.get(name.strip().lower())


def looks_like_header(columns: Sequence[str]) -> bool:
    """Return whether columns have known names for an image, a mask and a prompt."""
    known = {_ROLES.get(_plain(column)) for column in columns}
    return {"image", "mask", "prompt"} <= known


def find_columns(
    where: str, columns: Sequence[str], roles: Mapping[str, bool], chosen: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role in a header.

    Args:
        where: table and row, for messages.
        columns: names of the columns.
        roles: roles to find, and whether each is required.
        chosen: columns that the user named, by role; an empty name means that there is none.

    Raises:
        DataError: a chosen column is not there, a required one is missing, several columns may have a role, or an
            unused column looks like a misspelled name of an optional role.
    """
    named = {role_of(role): name for role, name in chosen.items()}
    found = {role: _named(where, columns, role, named[role]) for role in roles if named.get(role)}
    for role, required in roles.items():
        if role not in named:
            free = [column for column in columns if column and column not in found.values()]
            column = _known(where, free, role)
            if column is not None:
                found[role] = column
            elif required:
                raise DataError(_missing(where, columns, role))
    for role, required in roles.items():
        if required and role not in found:
            raise DataError(_missing(where, columns, role))
        if role not in found and role not in named:
            _refuse_misspelled(where, [column for column in columns if column not in found.values()], role)
    return {role: found[role] for role in roles if role in found}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


_ROLES = {_plain(name): role for role in CANONICAL for name in (role, CANONICAL[role], *ALIASES[role])}


def _named(where: str, columns: Sequence[str], role: str, name: str) -> str:
    if name in columns:
        return name
    similar = [column for column in columns if column.strip().lower() == name.strip().lower()]
    if len(similar) != 1:
        raise DataError(
            f"{where}: there is no column {name!r}, which --column names for the {role}. The columns are "
            f"{_list(columns)}."
        )
    return similar[0]


def _known(where: str, columns: Sequence[str], role: str) -> str | None:
    """Return the column with the canonical name of a role, else with an alias; raise DataError for several."""
    canonical = [column for column in columns if _plain(column) == CANONICAL[role]]
    found = canonical or [column for column in columns if _ROLES.get(_plain(column)) == role]
    if len(found) > 1:
        raise DataError(
            f"{where}: the columns {_list(found)} may all be the {role}. Give "
            f"{' or '.join(_option(role, column) for column in found)} (data.columns in a recipe)."
        )
    return found[0] if found else None


def _missing(where: str, columns: Sequence[str], role: str) -> str:
    return (
        f"{where}: column {CANONICAL[role]!r} is missing; its columns are {_list(columns)}. Add it, or name the column "
        f"of the {role} with --column {role}=NAME (data.columns in a recipe)."
    )


def _refuse_misspelled(where: str, columns: Sequence[str], role: str) -> None:
    names = {_plain(name) for name in (CANONICAL[role], *ALIASES[role])}
    for column in columns:
        if difflib.get_close_matches(_plain(column), names, 1, _CLOSE):
            raise DataError(
                f"{where}: column {column!r} looks like the {role}. Give {_option(role, column)} if it is, or "
                f"--column {role}= if the table has none (data.columns in a recipe)."
            )


def _option(role: str, column: str) -> str:
    return f"--column {shlex.quote(f'{role}={column}')}"


def _list(columns: Sequence[str]) -> str:
    return ", ".join(column for column in columns if column)
