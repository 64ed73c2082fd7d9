"""The plan of an ablation: which forms of a training are compared, over which seeds, on which films."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from cclip_deploy.common.toml_file import StrictModel, faults_of, read_toml
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
    """Synthetic films, drawn anew for every seed, whose signs follow the target's side in training."""

    train: _Count = 400
    val: _Count = 100
    test: _Count = 100
    """Of each of the three test sets, which show the same patients with other signs."""
    prompts_per_film: _Count = 1
    """The signs follow a film's first prompt, so with more than one they tell less."""
    confounders: Annotated[tuple[Kind, ...], Field(min_length=1)] = CONFOUNDERS  # type: ignore[assignment]
    rho: Annotated[float, Field(ge=0, le=1)] = DEFAULT_RHO
    """How often a sign stands for the target's side: in training and validation, and in the test set "id"."""


class Arm(StrictModel):
    """One row of the table."""

    recipe: Changes = Field(default_factory=dict)
    """What it changes in the plan's recipe."""
    settings: tuple[Changes, ...] = ()
    """Further changes to choose among by Dice on the val split, with the tuning seed; none leaves nothing to choose."""
    settings_of: Name | None = None
    """Another arm, whose settings and choice are taken over."""
    signs: Signs = "follow"
    """How signs stand on its training and validation films: as the plan says, by chance (rho 0.5), or not at all."""


class AblationPlan(StrictModel):
    """A checked plan; training/ablations/ holds examples."""

    reference: Name = "off"
    """The arm that the others are compared with, seed by seed."""
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1)] = (1, 2, 3)
    tuning_seed: _Seed = 0
    """With which settings are chosen; not one of `seeds`."""
    recipe: Changes
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    films: Films | None = None
    """Without them the recipe's own data set is trained and tested on."""

    @model_validator(mode="after")
    def _check_names(self) -> AblationPlan:
        for name, arm in self.arms.items():
            owner = arm.settings_of
            if owner is not None and (owner not in self.arms or self.arms[owner].settings_of or arm.settings):
                raise ValueError(f"arms.{name}.settings_of must name an arm with settings of its own, and have none")
            if arm.signs != "follow" and self.films is None:
                raise ValueError(f"arms.{name}.signs needs [films]: nothing is known of the signs on other pictures")
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
        """What the arm chooses among, at least one."""
        owner = self.arms[self.arms[arm].settings_of or arm]
        return owner.settings or ({},)

    def recipe_of(self, arm: str, setting: int, seed: int) -> TrainConfig:
        """The recipe of one training; UsageError names the key that is wrong."""
        changed = _merge(_merge(self.recipe, self.arms[arm].recipe), self.settings_of(arm)[setting])
        try:
            return TrainConfig.model_validate({**changed, "seed": seed})
        except ValidationError as error:
            raise UsageError(f"The recipe of arm {arm}, setting {setting + 1}: {faults_of(error)}.") from error


def read_plan(path: Path, data: Path | None = None) -> AblationPlan:
    """Read a plan, to run on another data set where one is given; UsageError says what is wrong."""
    plan = read_toml(path, AblationPlan, f"There is no plan {path}. training/ablations/ of the project has some.")
    if data is None:
        return plan
    elsewhere = {"films": None, "recipe": _merge(plan.recipe, {"data": {"folder": str(data)}})}
    try:
        return AblationPlan.model_validate({**plan.model_dump(), **elsewhere})
    except ValidationError as error:
        raise UsageError(f"{path} cannot run on {data}: {error.errors()[0]['msg']}.") from error


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Changes:
    """`changes` laid over `base`, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
