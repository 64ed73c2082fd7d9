"""Recipes and plans come with the package and can be copied."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cclip_deploy.ablation.plan import read_plan
from cclip_deploy.errors import UsageError
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.recipes import PACKAGE, copy_recipe, recipes
from tests.cli.run import invoke

ROOT = Path(__file__).parents[2]


def test_every_recipe_and_plan_of_training_is_listed_with_its_summary() -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "training").glob("*/*.toml")}
    assert {recipe.name for recipe in recipes()} == files
    assert len(files) >= 5
    assert all(len(recipe.summary) > 20 for recipe in recipes())


def test_copies_are_read_by_the_command_that_is_named(tmp_path: Path) -> None:
    for recipe in recipes():
        target = tmp_path / f"{recipe.name.replace('/', '-')}.toml"
        assert copy_recipe(recipe.name, target) == recipe
        assert target.read_bytes() == recipe.path.read_bytes()
        read_plan(target) if recipe.command == "ablate" else TrainConfig.from_toml(target)


@pytest.mark.parametrize(
    ("name", "message"), [("resnet", "No recipe is named 'resnet'"), ("qata_cov19", "Several recipes are named")]
)
def test_a_name_that_is_unknown_or_ambiguous_raises(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{message}.*configs/qata_cov19"):
        copy_recipe(name, tmp_path / "a.toml")
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_contains_what_an_installed_package_reads() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    places = {source: PACKAGE.parent / target for source, target in build["force-include"].items()}
    assert places == {f"training/{folder}": PACKAGE / "recipes" / folder for folder in ("configs", "ablations")}


def test_the_command_lists_copies_and_keeps_existing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "configs/mosmed_plus" in invoke("recipes").stdout
    listed = json.loads(invoke("recipes", "--json").stdout)
    assert {row["command"] for row in listed["recipes"]} == {"train", "ablate"}
    done = invoke("recipes", "mosmed_plus")
    assert "cclip-deploy train mosmed_plus.toml" in done.stdout
    Path("mosmed_plus.toml").write_text("mine")
    refused = invoke("recipes", "mosmed_plus")
    assert (refused.exit_code, Path("mosmed_plus.toml").read_text()) == (2, "mine")
    assert invoke("recipes", "mosmed_plus", "--force").exit_code == 0
    assert Path("mosmed_plus.toml").read_text() != "mine"
    assert invoke("recipes", "-o", "x.toml").exit_code == 2
