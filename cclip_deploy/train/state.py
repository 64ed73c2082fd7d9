"""Training state: saved to one file without pickled code, and restored to resume a run bit for bit."""

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
"""Prefixes of settings that do not change the result; the data set is compared by its contents."""
OLDER_VERSIONS = {"game.own_step_statistics": False}
"""Behavior of versions without a setting. Only mode "alternating" uses this one."""


@dataclass
class TrainState:
    """Network, optimizers, and the moving average of the weights if there is one."""

    fabric: Fabric
    model: CausalCLIPSeg
    frozen: list[nn.Module]
    optimizers: list[Optimizer]
    average: AveragedModel | None

    @property
    def evaluated_model(self) -> CausalCLIPSeg:
        """The network to validate and save: the moving average if there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]


@dataclass
class TrainingPosition:
    """Progress of a training run."""

    epoch: int = 0
    steps_in_epoch: int = 0
    step_losses: list[list[float]] = field(default_factory=list)
    """One row per step: total, causal and confounding loss (NaN without one), means of the masks 3, 4, 5."""
    best_dice: float | None = None
    best_epoch: int | None = None
    validations_since_best: int = 0
    stopped_early: bool = False
    stepping_s: float = 0.0
    waiting_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of saved states, in which `step_losses` is called "told"."""
        return {"told" if name == "step_losses" else name: value for name, value in self.__dict__.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainingPosition:
        """Return the position that `to_dict` described."""
        return TrainingPosition(**{"step_losses" if name == "told" else name: v for name, v in values.items()})


@dataclass(frozen=True)
class Identity:
    """Recipe and data set contents of a run, which must not change when it resumes."""

    recipe: Mapping[str, Any]
    data: Mapping[str, Any]

    @staticmethod
    def of(config: TrainConfig, data: Mapping[str, Any]) -> Identity:
        """Return the identity of a recipe and splits; `data` has a `training_set.data_fingerprint` per split."""
        return Identity(config.model_dump(mode="json"), data)

    def differences(self, other: Identity, more_epochs: bool = False) -> list[str]:
        """Describe how the current identity `other`, which may have `more_epochs`, differs from this saved one."""
        now, then = (
            OLDER_VERSIONS | dict(_flatten({**identity.recipe, "data set": identity.data}))
            for identity in (other, self)
        )
        unused = () if now.get("mode") == "alternating" else tuple(OLDER_VERSIONS)
        return [
            f"{key} ({_shorten(then.get(key))} then, {_shorten(now.get(key))} now)"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
            and not key.startswith((*MAY_DIFFER, *unused))
            and not (more_epochs and key == "epochs" and then[key] < now[key])
        ]


def save_state(folder: Path, state: TrainState, progress: TrainingPosition, identity: Identity) -> None:
    """Write the state into a run's folder atomically; raise EnvironmentIssue if the disk is full."""
    average = None if state.average is None else state.average.state_dict()
    contents = {
        "format": FORMAT,
        "identity": json.dumps({"recipe": identity.recipe, "data": identity.data}),
        "progress": json.dumps(progress.to_dict()),
        "model": state.model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in state.optimizers],
        "average": average,
        "precision": state.fabric.strategy.precision.state_dict(),
        "random": torch.random.get_rng_state(),
    }
    with whole_file(folder / STATE) as unfinished:
        try:
            torch.save(contents, unfinished)
        except RuntimeError as error:  # torch raises this if the disk is full
            raise EnvironmentIssue(
                f"{folder / STATE} could not be written ({str(error).splitlines()[0]}). The previous state is kept. "
                "Free some disk space and continue with --resume."
            ) from error


def load_state(folder: Path, state: TrainState, identity: Identity) -> TrainingPosition:
    """Load a saved state into a new `state`, and return its position.

    Raises:
        CheckpointError: the file is damaged or has another format version.
        UsageError: the state is of another recipe or data set; the message lists the differences.
    """
    path = folder / STATE
    saved = _read(path)
    try:
        differing = Identity(**json.loads(saved["identity"])).differences(identity, more_epochs=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if differing:
        raise UsageError(
            f"{path} is the state of another training, which differs in {'; '.join(differing)}. "
            "Use the same recipe and data set, or another output folder."
        )
    try:
        refuse_types(path, saved["model"], state.model.state_dict())
        state.model.load_state_dict(saved["model"])
        for optimizer, values in zip(state.optimizers, saved["optimisers"], strict=True):
            optimizer.load_state_dict(values)
        if state.average is not None:
            refuse_types(path, saved["average"], state.average.state_dict())
            state.average.load_state_dict(saved["average"])
        state.fabric.strategy.precision.load_state_dict(saved["precision"])
        torch.random.set_rng_state(saved["random"])
        return TrainingPosition.from_dict(json.loads(saved["progress"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise _damaged(path, error) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "identity" not in saved:
        raise CheckpointError(f"{path} is not a {FORMAT!r}. Resume with the version of cclip-deploy that wrote it.")
    return saved


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:90]
    return CheckpointError(f"{path} is a damaged training state ({reason}). Train into another folder.")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
