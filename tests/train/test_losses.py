"""Losses against their definitions in NumPy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cclip_deploy.train.losses import dice_bce, soft_dice_loss


@pytest.mark.parametrize("dice_weight", [0.0, 0.3, 1.0])
def test_dice_bce_matches_its_definition(dice_weight: float) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 2, (2, 3, 5, 7)), (rng.random((2, 3, 5, 7)) > 0.6).astype(np.float64)
    p = 1 / (1 + np.exp(-logits))
    bce = -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))
    each = [
        1 - (2 * (p[i, j] * target[i, j]).sum() + 1) / (p[i, j].sum() + target[i, j].sum() + 1)
        for i in range(2)
        for j in range(3)
    ]
    loss = dice_bce(torch.from_numpy(logits), torch.from_numpy(target), dice_weight)
    assert loss.item() == pytest.approx(dice_weight * np.mean(each) + (1 - dice_weight) * bce, rel=1e-12)


def test_a_perfect_prediction_has_zero_loss_even_for_an_empty_mask() -> None:
    target = torch.zeros(2, 4, 4, dtype=torch.float64)
    target[0, 1:3, 1:3] = 1
    assert dice_bce(200 * target - 100, target).item() == pytest.approx(0, abs=1e-12)


def test_the_dice_loss_of_an_empty_mask_decreases_with_the_prediction() -> None:
    target = torch.zeros(1, 4, 4)
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    torch.autograd.backward(soft_dice_loss(logits, target))
    assert logits.grad is not None
    assert (logits.grad > 0).all()
