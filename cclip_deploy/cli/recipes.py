"""The command `cclip-deploy recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, reports_errors, stdout, table
from cclip_deploy.errors import UsageError


@reports_errors
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe or plan to copy. Default: list all.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the copy. Default: NAME.toml in this folder.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    json: options.Json = False,
) -> None:
    """List the training recipes and ablation plans that come with cclip-deploy, or [bold]copy one[/] to change it."""
    from cclip_deploy.train.recipes import copy_recipe
    from cclip_deploy.train.recipes import recipes as shipped

    if name is None:
        if output is not None:
            raise UsageError("--output needs the name of a recipe. Give one, or leave --output out to list them.")
        found = shipped()
        if json:
            print_json(
                {"recipes": [{"name": r.name, "command": r.command, "summary": r.summary} for r in found]}, "recipes"
            )
            return
        shown = table("Recipes and plans", "name", "for", "content")
        for recipe in found:
            shown.add_row(recipe.name, recipe.command, recipe.summary)
        stdout.print(shown)
        return
    target = output or Path(f"{name.split('/')[-1]}.toml")
    recipe = copy_recipe(name, target, force)
    if json:
        print_json({"recipe": recipe.name, "command": recipe.command, "file": str(target)}, "recipes")
    else:
        stdout.print(f"{target}: a copy of {recipe.name}. Run it: cclip-deploy {recipe.command} {target}", markup=False)
