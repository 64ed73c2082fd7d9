"""All that a training needs to go on as if it had never stopped, in one file that holds no code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from cclip_deploy.common.files import whole_file
from cclip_deploy.errors import CheckpointError, EnvironmentIssue, UsageError
from cclip_deploy.model.checkpoint import refuse_types
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import TrainConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STATE = "state.pt"
FORMAT = "cclip-deploy training state 1"
MAY_DIFFER = ("data.", "threads", "loader_threads", "cache_gib", "save_minutes")
"""Settings that change neither what is computed nor from what; the data set is known by its contents."""
OLDER_VERSIONS = {"game.own_step_statistics": False}
"""What training did before a setting existed; only "alternating" reads this one."""


@dataclass
class Learner:
    """The network, and what moves it."""

    fabric: Fabric
    model: CausalCLIPSeg
    frozen: list[nn.Module]
    optimizers: list[Optimizer]
    average: AveragedModel | None

    @property
    def shown(self) -> CausalCLIPSeg:
        """The network that is validated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]


@dataclass
class TrainingPosition:
    """How far a training is."""

    epoch: int = 0
    steps_in_epoch: int = 0
    told: list[list[float]] = field(default_factory=list)
    """One row a step: total, causal and confounding loss (NaN without one), means of the masks 3, 4, 5."""
    best_dice: float | None = None
    best_epoch: int | None = None
    validations_since_best: int = 0
    stopped_early: bool = False
    stepping_s: float = 0.0
    waiting_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an epoch."""


@dataclass(frozen=True)
class Identity:
    """What must be the same for a training to go on: the recipe, and the data set by its contents."""

    recipe: Mapping[str, Any]
    data: Mapping[str, Any]

    @staticmethod
    def of(config: TrainConfig, data: Mapping[str, Any]) -> Identity:
        """The identity of a recipe on splits that `training_set.fingerprint` describes."""
        return Identity(config.model_dump(mode="json"), data)

    def differences(self, other: Identity) -> list[str]:
        """In words, what another identity has otherwise."""
        theirs, ours = (
            OLDER_VERSIONS | dict(_flatten({**identity.recipe, "data set": identity.data}))
            for identity in (other, self)
        )
        unread = () if theirs.get("mode") == "alternating" else tuple(OLDER_VERSIONS)
        return [
            f"{key} ({_shorten(ours.get(key))} then, {_shorten(theirs.get(key))} now)"
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key) and not key.startswith((*MAY_DIFFER, *unread))
        ]


def save_state(folder: Path, learner: Learner, progress: TrainingPosition, identity: Identity) -> None:
    """Replace the state in a run's folder, whole or not at all; EnvironmentIssue where the disk does not take it."""
    average = None if learner.average is None else learner.average.state_dict()
    state = {
        "format": FORMAT,
        "identity": json.dumps({"recipe": identity.recipe, "data": identity.data}),
        "progress": json.dumps(progress.__dict__),
        "model": learner.model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "average": average,
        "precision": learner.fabric.strategy.precision.state_dict(),
        "random": torch.random.get_rng_state(),
    }
    with whole_file(folder / STATE) as unfinished:
        try:
            torch.save(state, unfinished)
        except RuntimeError as error:  # how torch's own writer says that the disk did not take it
            raise EnvironmentIssue(
                f"{folder / STATE} could not be written ({str(error).splitlines()[0]}); the state before it is still "
                "there. Free some space and go on with --resume."
            ) from error


def load_state(folder: Path, learner: Learner, identity: Identity) -> TrainingPosition:
    """Put a saved state into a fresh learner, and tell how far it was.

    Raises:
        CheckpointError: the file is damaged, or no state of this version.
        UsageError: it is the state of another recipe or data set; the message says what differs.
    """
    path = folder / STATE
    saved = _read(path)
    try:
        differing = Identity(**json.loads(saved["identity"])).differences(identity)
    except (TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if differing:
        raise UsageError(
            f"{path} is the state of another training, which differs in {'; '.join(differing)}. "
            "Give that recipe and data set, or train into another folder."
        )
    try:
        refuse_types(path, saved["model"], learner.model.state_dict())
        learner.model.load_state_dict(saved["model"])
        for optimizer, state in zip(learner.optimizers, saved["optimisers"], strict=True):
            optimizer.load_state_dict(state)
        if learner.average is not None:
            refuse_types(path, saved["average"], learner.average.state_dict())
            learner.average.load_state_dict(saved["average"])
        learner.fabric.strategy.precision.load_state_dict(saved["precision"])
        torch.random.set_rng_state(saved["random"])
        return TrainingPosition(**json.loads(saved["progress"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch stumble over anything
        raise _damaged(path, error) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "identity" not in saved:
        raise CheckpointError(f"{path} is no {FORMAT!r}. Resume with the cclip-deploy that wrote it.")
    return saved


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:90]
    return CheckpointError(f"{path} is a damaged state of a training ({reason}). Train into another folder.")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
