"""Example recipes and ablation plans that are shipped with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cclip_deploy.common.files import whole_file
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = {"train": "configs", "ablate": "ablations"}
"""Folder of the files by the command that reads them."""


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe or plan: the command that reads it, and the first sentence of it."""

    name: str
    command: str
    path: Path
    summary: str


def recipes() -> list[Recipe]:
    """Return the shipped recipes, then the ablation plans.

    They are in the package if it was installed from a wheel, and in training/ in a checkout.
    """
    found = []
    for command, folder in FOLDERS.items():
        places = (PACKAGE / "recipes" / folder, PACKAGE.parent / "training" / folder)
        place = next((path for path in places if path.is_dir()), places[0])
        for path in sorted(place.glob("*.toml")):
            first = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
            comment = " ".join(line.removeprefix("#").strip() for line in first if line.startswith("#"))
            summary = f"{comment.split('. ')[0].rstrip('.')}."
            found.append(Recipe(f"{folder}/{path.stem}", command, path, summary))
    return found


def copy_recipe(name: str, output: Path, replace: bool = False) -> Recipe:
    """Copy a recipe or plan to a file.

    Args:
        name: as in `recipes`, such as `configs/synthetic_tiny`; the folder may be left out if no other has the name.
        output: the new file.
        replace: replace an existing file.

    Raises:
        UsageError: there is no such recipe, several have the name, or `output` exists and `replace` is false.
        EnvironmentIssue: the file cannot be written.
    """
    known = recipes()
    found = [recipe for recipe in known if name in (recipe.name, recipe.name.split("/")[1])]
    if len(found) != 1:
        names = ", ".join(recipe.name for recipe in found or known)
        raise UsageError(f"{'Several recipes are' if found else 'No recipe is'} named {name!r}. Use one of: {names}.")
    if output.exists() and not replace:
        raise UsageError(f"{output} exists already. Choose another file, or give --force to replace it.")
    check_writable(output)
    with whole_file(output) as unfinished:
        unfinished.write_bytes(found[0].path.read_bytes())
    return found[0]
