"""Damaged or inconsistent training states raise CheckpointError, and no tensor is cast silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cclip_deploy.errors import CheckpointError
from cclip_deploy.train.state import STATE, Identity, TrainingPosition, TrainState, load_state, save_state

IDENTITY = Identity({"mode": "joint"}, {"pictures": "0"})


def learner() -> TrainState:
    """A learner of one small layer."""
    model: Any = torch.nn.Linear(2, 2)
    precision = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: dict(state))
    fabric: Any = SimpleNamespace(strategy=SimpleNamespace(precision=precision))
    return TrainState(fabric, model, [], [torch.optim.SGD(model.parameters(), 0.1)], None)


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Any]:
    save_state(tmp_path, learner(), TrainingPosition(epoch=3), IDENTITY)
    found: dict[str, Any] = torch.load(tmp_path / STATE, weights_only=True)
    return found


def test_a_sound_state_is_loaded(state: dict[str, Any], tmp_path: Path) -> None:
    assert load_state(tmp_path, learner(), IDENTITY).epoch == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identity", "null"),
        ("identity", "[1, 2]"),
        ("identity", "{}"),
        ("identity", '{"recipe": 1, "data": 2}'),
        ("identity", 7),
        pytest.param("identity", "[" * 100_000, id="identity-deep"),
        ("model", None),
        ("model", []),
        ("model", {}),
        ("model", {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.zeros(2)}),
        ("model", {"weight": torch.ones(2, 2, dtype=torch.complex64), "bias": torch.zeros(2)}),
        ("model", {"weight": torch.ones(2, 2, dtype=torch.bool), "bias": torch.zeros(2)}),
        ("model", {"weight": "a", "bias": "b"}),
        ("model", {"weight": torch.ones(2, 2), "bias": torch.zeros(2), "more": torch.zeros(1)}),
        ("optimisers", None),
        ("optimisers", [1]),
        ("optimisers", []),
        ("precision", 1),
        ("random", None),
        ("random", torch.zeros(3)),
        ("progress", "[]"),
        ("progress", '{"surprise": 1}'),
        ("progress", None),
    ],
    ids=str,
)
def test_a_state_of_other_contents_is_a_damaged_one(
    key: str, value: object, state: dict[str, Any], tmp_path: Path
) -> None:
    """Before, several were tracebacks, and int8, boolean and complex weights were cast."""
    torch.save({**state, key: value}, tmp_path / STATE)
    with pytest.raises(CheckpointError, match=r"state\.pt (is a damaged training state|has|lacks)") as caught:
        load_state(tmp_path, learner(), IDENTITY)
    assert "\n" not in str(caught.value)


def test_a_state_cut_off_anywhere_is_a_damaged_one(state: dict[str, Any], tmp_path: Path) -> None:
    whole = (tmp_path / STATE).read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        (tmp_path / STATE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"state\.pt is a damaged training state"):
            load_state(tmp_path, learner(), IDENTITY)
