"""Tests of training recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.common.toml_file import parse_settings
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.train.config import TrainConfig

RECIPES = Path(__file__).parents[2] / "training" / "configs"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_published_recipes_are_valid(recipe: Path) -> None:
    TrainConfig.from_toml(recipe)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1", r"learning_rat: unknown key .did you mean learning_rate\?"),
        ("epochs = 0", "epochs: input should be greater than 0"),
        ("image_size = 100", "not a positive multiple of 32"),
        ("mode = 'both'", "mode: input should be 'off', 'joint', 'alternating' or 'reversal'"),
        ("epochs 3", "is not a TOML file"),
        ("[game]\nmask_budget = 1.0", "game.mask_budget: input should be less than 1"),
        ("[game]\nmaskers_steps = 1", "game.maskers_steps: unknown key .did you mean game.masker_steps"),
        ("learning_rate = inf", "learning_rate: input should be a finite number"),
        ("frozen = ['layer9']", "frozen.0: input should be 'stem', 'layer1'"),
        ("[devices]\nprecision = '8-bit'", "devices.precision: input should be '32-true'"),
        ("clip_weights = 'openai'\nstart_checkpoint = 'a.pth'", "both set the towers' initial weights"),
        ("image_size = 32\nimages_per_batch = 1", "images_per_batch 1 needs an image_size of at least 64"),
    ],
)
def test_an_invalid_recipe_is_refused_by_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_toml(tmp_path / "recipe.toml")


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recipe"):
        TrainConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("game.masker_stepz=2", r"game.masker_stepz: unknown key .did you mean game.masker_steps\?"),
        ("masker_steps=2", r"masker_steps: unknown key .did you mean game.masker_steps\?"),
        ("zzz=2", "zzz: unknown key[.]"),
        ("epochs=many", "epochs: input should be a valid integer"),
        ("epochs", "is not a setting"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest_key(tmp_path: Path, settings: str, words: str) -> None:
    (tmp_path / "recipe.toml").write_text("epochs = 3")
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_toml(tmp_path / "recipe.toml", changes=parse_settings([settings]))


def test_settings_are_typed_by_the_model_and_leave_the_rest_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[game]\nmasker_steps = 3\nmasker_rate = 2.0")
    changes = parse_settings(["game.masker_steps=2", "mode=joint", "epochs=7", 'frozen=["stem"]', "image_size=64x96"])
    config = TrainConfig.from_toml(tmp_path / "recipe.toml", changes=changes)
    assert (config.game.masker_steps, config.game.masker_rate, config.mode, config.epochs) == (2, 2.0, "joint", 7)
    assert (config.frozen, config.image_hw) == (("stem",), (64, 96))
