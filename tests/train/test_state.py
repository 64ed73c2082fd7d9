"""Tests of the identity of saved states; test_run.py tests resuming."""

from __future__ import annotations

from cclip_deploy.train.config import Game, TrainConfig
from cclip_deploy.train.state import Identity


def of_older_version(config: TrainConfig) -> Identity:
    """Return the identity as written before `own_step_statistics` existed."""
    recipe = config.model_dump(mode="json")
    del recipe["game"]["own_step_statistics"]
    return Identity(recipe, {})


def test_a_state_of_an_older_version_resumes_with_its_behavior() -> None:
    joint = TrainConfig(mode="joint")
    assert of_older_version(joint).differences(Identity.of(joint, {})) == []
    now = TrainConfig(mode="alternating")
    assert of_older_version(now).differences(Identity.of(now, {})) == [
        "game.own_step_statistics (False then, True now)"
    ]
    as_before = TrainConfig(mode="alternating", game=Game(own_step_statistics=False))
    assert of_older_version(as_before).differences(Identity.of(as_before, {})) == []
    assert Identity.of(now, {}).differences(Identity.of(as_before, {}))


def test_a_run_resumes_with_more_epochs_and_not_with_fewer() -> None:
    shorter, longer = (Identity.of(TrainConfig(epochs=epochs), {}) for epochs in (3, 5))
    assert shorter.differences(longer, more_epochs=True) == []
    assert shorter.differences(longer) == ["epochs (3 then, 5 now)"]
    assert longer.differences(shorter, more_epochs=True) == ["epochs (5 then, 3 now)"]
