"""Tests of ablation plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.ablation.plan import AblationPlan, read_plan
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.train.config import MODES

PLANS = Path(__file__).parents[2] / "training" / "ablations"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_all_example_plans_are_valid_and_compare_all_modes(path: Path) -> None:
    plan = read_plan(path)
    assert {plan.recipe_of(arm, 0, 1).mode for arm in plan.arms} == set(MODES)
    assert len(plan.seeds) >= 3


def test_the_synthetic_plan_has_an_unconfounded_arm_with_the_settings_of_off() -> None:
    plan = read_plan(PLANS / "synthetic_tiny.toml")
    assert plan.arms["clean"].signs == "by-chance"
    assert plan.settings_of("clean") == plan.settings_of("off")


def test_arm_and_setting_are_merged_into_the_recipe() -> None:
    plan = AblationPlan.model_validate({
        "reference": "a", "films": {}, "recipe": {"epochs": 3, "game": {"masker_steps": 2, "masker_rate": 0.5}},
        "arms": {"a": {"recipe": {"mode": "joint"}, "settings": [{}, {"game": {"masker_rate": 0.1}}]}},
    })  # fmt: skip
    config = plan.recipe_of("a", 1, 7)
    assert (config.mode, config.epochs, config.seed) == ("joint", 3, 7)
    assert (config.game.masker_steps, config.game.masker_rate) == (2, 0.1)
    assert plan.recipe_of("a", 0, 7).game.masker_rate == 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "[films]\n[recipe]\n[arms.off]\nsettings = [{}, {game = {masker_rte = 1}}]",
            "arm off, setting 2: game.masker",
        ),
        ("reference = 'x'\n[films]\n[recipe]\n[arms.off]", "reference 'x' is none of the arms off"),
        ("seeds = [1, 1]\n[films]\n[recipe]\n[arms.off]", "differ from each other"),
        ("seeds = [0, 1]\n[films]\n[recipe]\n[arms.off]", "tuning_seed"),
        ("[recipe]\n[arms.off]", r"either \[films\], or a data set"),
        ("[films]\n[recipe.data]\nfolder = 'x'\n[arms.off]", r"either \[films\], or a data set"),
        ("[recipe.data]\nfolder = 'x'\n[arms.off]\nsigns = 'none'", r"arms.off.signs needs \[films\]"),
        ("[films]\n[recipe]\n[arms.off]\n[arms.b]\nsettings_of = 'c'", "arms.b.settings_of"),
        ("[films]\nconfounders = ['halo']\n[recipe]\n[arms.off]", "films.confounders"),
        ("[films]\n[recipe]\n[arms.'../x']", "arms"),
        ("[films]\n[recipe]", "arms: field required"),
        ("[films", "not a TOML"),
    ],
)
def test_an_invalid_plan_is_refused_with_the_reason(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        read_plan(write(tmp_path / "plan.toml", text))


def test_another_data_set_replaces_the_plans_own(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.toml", "[recipe.data]\nfolder = 'x'\nlayout = 'flat'\n[arms.off]")
    source = read_plan(path, tmp_path).recipe_of("off", 0, 1).data
    assert (source.folder, source.layout) == (tmp_path, "flat")


def test_a_plan_that_needs_synthetic_images_cannot_use_a_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.toml", "[films]\n[recipe]\n[arms.off]\n[arms.clean]\nsigns = 'by-chance'")
    with pytest.raises(UsageError, match=r"arms\.clean\.signs needs"):
        read_plan(path, tmp_path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no plan .*none.toml"):
        read_plan(tmp_path / "none.toml")
