"""Segmentation losses on logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMOOTHING_PX = 1.0


def dice_bce(logits: Tensor, target: Tensor, dice_weight: float = 0.5) -> Tensor:
    """`dice_weight` x soft Dice loss + the rest x binary cross-entropy, a scalar: 0 where all is right.

    Args:
        logits: (..., H, W), any leading shape; every map is a mask of its own.
        target: the same shape, 0 or 1, of a float type.
        dice_weight: share of the Dice loss, in [0, 1]; 0 is cross-entropy alone, as in CRIS.

    The Dice loss is 1 - (2 sum(pt) + s) / (sum(p) + sum(t) + s), averaged over the maps; s = 1 pixel, so that an empty
    mask has a gradient and counts 0 where the prediction is empty too (Milletari et al., 3DV 2016, without squares).
    """
    from torch.nn import functional

    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target)
    return dice_weight * soft_dice_loss(logits, target) + (1 - dice_weight) * cross_entropy


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The Dice part of `dice_bce`: a scalar in [0, 1]."""
    from monai.losses import DiceLoss

    dice = DiceLoss(sigmoid=True, smooth_nr=SMOOTHING_PX, smooth_dr=SMOOTHING_PX)
    maps = logits.flatten(0, -3).unsqueeze(1)  # (maps, 1, H, W)
    loss: Tensor = dice(maps, target.flatten(0, -3).unsqueeze(1))
    return loss
