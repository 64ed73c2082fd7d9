"""Segmentation losses on logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMOOTHING_PX = 1.0


def dice_bce(logits: Tensor, target: Tensor, dice_weight: float = 0.5) -> Tensor:
    """Return `dice_weight` x soft Dice loss + (1 - `dice_weight`) x binary cross-entropy, a scalar.

    The Dice loss is 1 - (2 sum(pt) + s) / (sum(p) + sum(t) + s), averaged over the maps (Milletari et al., 3DV 2016,
    without squares). With s = 1 pixel an empty target has a gradient, and an empty prediction for it has loss 0.

    Args:
        logits: (..., H, W), one mask per map.
        target: same shape, 0 or 1, floating point.
        dice_weight: weight of the Dice loss in [0, 1]; 0 is cross-entropy only, as in CRIS.
    """
    from torch.nn import functional

    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target)
    return dice_weight * soft_dice_loss(logits, target) + (1 - dice_weight) * cross_entropy


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Dice loss of `dice_bce`, a scalar in [0, 1]."""
    from monai.losses import DiceLoss

    dice = DiceLoss(sigmoid=True, smooth_nr=SMOOTHING_PX, smooth_dr=SMOOTHING_PX)
    maps = logits.flatten(0, -3).unsqueeze(1)  # (maps, 1, H, W)
    loss: Tensor = dice(maps, target.flatten(0, -3).unsqueeze(1))
    return loss
