"""Ablation plan: the arms to compare, their recipes and settings, the seeds and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from cclip_deploy.common.toml_file import StrictModel, faults_of, merge, read_toml
from cclip_deploy.datasets.synthetic.confounders import CONFOUNDERS, DEFAULT_RHO
from cclip_deploy.errors import UsageError
from cclip_deploy.train.config import TrainConfig

Kind = Literal["marker", "text", "collimation", "gain", "blur"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
Changes = dict[str, Any]
Signs = Literal["follow", "by-chance", "none"]

_Seed = Annotated[int, Field(ge=0)]
_Count = Annotated[int, Field(gt=0)]


class Films(StrictModel):
    """Synthetic images, generated for every seed, whose confounders follow the target's side in training."""

    train: _Count = 400
    val: _Count = 100
    test: _Count = 100
    """Images of each of the three test sets, which show the same patients with other confounders."""
    prompts_per_film: _Count = 1
    """Confounders follow an image's first prompt, so they are less informative with several."""
    confounders: Annotated[tuple[Kind, ...], Field(min_length=1)] = CONFOUNDERS  # type: ignore[assignment]
    rho: Annotated[float, Field(ge=0, le=1)] = DEFAULT_RHO
    """Probability that a confounder is on the target's side, in training, validation and the test set "id"."""


class Arm(StrictModel):
    """One arm: a variant of the training."""

    recipe: Changes = Field(default_factory=dict)
    """Changes to the plan's recipe."""
    settings: tuple[Changes, ...] = ()
    """Alternative further changes. The one with the best validation Dice with the tuning seed is chosen."""
    settings_of: Name | None = None
    """Another arm, whose settings and choice this arm uses."""
    signs: Signs = "follow"
    """Confounders in training and validation images: with the plan's rho, by chance (rho 0.5), or none."""


class AblationPlan(StrictModel):
    """A validated plan; training/ablations/ has examples."""

    reference: Name = "off"
    """The arm that the others are compared with, paired by seed."""
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1)] = (1, 2, 3)
    tuning_seed: _Seed = 0
    """Seed for choosing settings; not one of `seeds`."""
    recipe: Changes
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    films: Films | None = None
    """Synthetic images; if not given, the recipe's data set is used."""

    @model_validator(mode="after")
    def _check_names(self) -> AblationPlan:
        for name, arm in self.arms.items():
            owner = arm.settings_of
            if owner is not None and (owner not in self.arms or self.arms[owner].settings_of or arm.settings):
                raise ValueError(f"arms.{name}.settings_of must name an arm with settings of its own, and have none")
            if arm.signs != "follow" and self.films is None:
                raise ValueError(f"arms.{name}.signs needs [films], as confounders are known only in synthetic images")
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds) or self.tuning_seed in self.seeds:
            raise ValueError("seeds must differ from each other and from tuning_seed")
        return self

    @model_validator(mode="after")
    def _check_recipes(self) -> AblationPlan:
        for name in self.arms:
            for number in range(len(self.settings_of(name))):
                config = self.recipe_of(name, number, 0)
                if (config.data.folder is None) != (self.films is not None):
                    raise ValueError("the plan needs either [films], or a data set (recipe.data.folder, or --data)")
        return self

    def settings_of(self, arm: str) -> tuple[Changes, ...]:
        """Return the settings to choose from, at least one."""
        owner = self.arms[self.arms[arm].settings_of or arm]
        return owner.settings or ({},)

    def recipe_of(self, arm: str, setting: int, seed: int) -> TrainConfig:
        """Return the recipe of one training; raise UsageError naming an invalid key."""
        changed = merge(merge(self.recipe, self.arms[arm].recipe), self.settings_of(arm)[setting])
        try:
            return TrainConfig.model_validate({**changed, "seed": seed})
        except ValidationError as error:
            raise UsageError(
                f"The recipe of arm {arm}, setting {setting + 1}: {faults_of(error, TrainConfig)}."
            ) from error


def read_plan(path: Path, data: Path | None = None) -> AblationPlan:
    """Read a plan, and replace its data set by `data` if given.

    Raises:
        DataError: the plan does not exist.
        UsageError: the plan is invalid.
    """
    plan = read_toml(path, AblationPlan, f"There is no plan {path}. training/ablations/ has examples.")
    if data is None:
        return plan
    elsewhere = {"films": None, "recipe": merge(plan.recipe, {"data": {"folder": str(data)}})}
    try:
        return AblationPlan.model_validate({**plan.model_dump(), **elsewhere})
    except ValidationError as error:
        raise UsageError(f"{path} cannot run on {data}: {error.errors()[0]['msg']}.") from error
