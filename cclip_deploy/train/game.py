"""Losses of the min-max game between the maskers and the rest of the network (Chen et al., MICCAI 2024).

mode         loss                              trained parameters
off          L_causal                          all except the confounding head
joint        w_c L_causal + w_f L_confounding  all
alternating  w_c L_causal + w_f L_confounding  all except the maskers, with detached masks
             w_c L_causal - w_f L_confounding  only the maskers, in separate steps
reversal     w_c L_causal + w_f L_confounding  all in one step; the maskers' input is detached, and their gradient of
                                               L_confounding is reversed

In mode "alternating" a batch norm updates its running statistics only in the steps that train it
(`Game.own_step_statistics`). It normalizes by batch statistics in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cclip_deploy.model.neck import CausalNeck
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.losses import dice_bce
from cclip_deploy.train.shared_image_pass import head_logits, prompt_states

Levels = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TensorBatch:
    """B images with P prompts each, on the training device."""

    images: Tensor  # (B, 3, H, W)
    tokens: Tensor  # (B, P, L)
    masks: Tensor  # (B, P, H, W), 0 or 1, same dtype as `images`


@dataclass(frozen=True)
class Losses:
    """Total loss of one step and its terms."""

    total: Tensor
    causal: Tensor
    confounding: Tensor | None
    mask_means: Tensor  # (3,), levels 3, 4, 5


def has_adversary(config: TrainConfig) -> bool:
    """Whether the maskers have separate steps."""
    return config.mode == "alternating"


def maskers_of(model: CausalCLIPSeg) -> list[nn.Module]:
    """Return the maskers of levels 3, 4 and 5."""
    return [model.neck.masker3, model.neck.masker4, model.neck.masker5]


def main_losses(model: CausalCLIPSeg, batch: TensorBatch, config: TrainConfig, epoch: int) -> Losses:
    """Return the losses of the main step, which also trains the maskers except in mode "alternating"."""
    levels = model.neck.levels(model.image_tower(batch.images))
    states = prompt_states(model, batch.tokens)
    if config.mode == "off":
        masks = model.neck.masks(levels)
        return _causal_loss(model, levels, masks, states, batch, config)
    at_one = epoch < config.game.masks_at_one_epochs
    masks = _main_masks(model, levels, config, at_one)
    reverse = config.mode == "reversal" and not at_one
    reversed_masks = tuple(_GradientReversal.apply(mask) for mask in masks) if reverse else masks
    # At one, both branches use all features, so the confounding masks are not one minus the causal masks.
    confounding_masks = masks if at_one else tuple(1 - mask for mask in reversed_masks)
    return _both_losses(model, levels, masks, confounding_masks, states, batch, config, sign=1.0)


def masker_losses(model: CausalCLIPSeg, batch: TensorBatch, config: TrainConfig) -> Losses:
    """Return the losses of a masker step, from a new forward pass without gradients before the maskers."""
    own = {norm for masker in maskers_of(model) for norm in _batch_norms(masker)}
    others = [norm for norm in _batch_norms(model) if norm not in own]
    with _freeze_running_stats(others, config.game.own_step_statistics):
        with torch.no_grad():
            levels = model.neck.levels(model.image_tower(batch.images))
            states = prompt_states(model, batch.tokens)
        masks = model.neck.masks(levels)
        confounding_masks: Levels = tuple(1 - mask for mask in masks)  # type: ignore[assignment]
        return _both_losses(model, levels, masks, confounding_masks, states, batch, config, sign=-1.0)


@contextmanager
def train_only_maskers(model: CausalCLIPSeg) -> Iterator[None]:
    """Disable gradients of all parameters except the maskers' within the block."""
    own = {id(p) for masker in maskers_of(model) for p in masker.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _main_masks(model: CausalCLIPSeg, levels: Levels, config: TrainConfig, at_one: bool) -> Levels:
    if at_one:
        return tuple(torch.ones_like(level) for level in levels)  # type: ignore[return-value]
    if config.mode == "joint":
        return model.neck.masks(levels)
    detached: Levels = tuple(level.detach() for level in levels)  # type: ignore[assignment]
    if config.mode == "reversal":
        return model.neck.masks(detached)
    norms = [norm for masker in maskers_of(model) for norm in _batch_norms(masker)]
    with torch.no_grad(), _freeze_running_stats(norms, config.game.own_step_statistics):
        return model.neck.masks(detached)


def _causal_loss(
    model: CausalCLIPSeg, levels: Levels, masks: Levels, states: Tensor, batch: TensorBatch, config: TrainConfig
) -> Losses:
    logits = head_logits(model.head, _aggregate(model.neck, levels, masks), states)
    causal = dice_bce(logits.to(batch.masks.dtype), batch.masks, config.dice_weight)
    means = _means(masks)
    return Losses(causal + _mask_budget_loss(means, config), causal.detach(), None, means.detach())


def _both_losses(
    model: CausalCLIPSeg, levels: Levels, masks: Levels, confounding_masks: Levels, states: Tensor, batch: TensorBatch,
    config: TrainConfig, *, sign: float,
) -> Losses:  # fmt: skip
    """Return w_c L_causal + sign x w_f L_confounding."""
    game = config.game
    causal_features = _aggregate(model.neck, levels, masks)
    with _freeze_running_stats(_batch_norms(model.neck.aggregate), game.causal_statistics_only):
        confounding_features = _aggregate(model.neck, levels, confounding_masks)
    causal, confounding = (
        dice_bce(head_logits(head, features, states).to(batch.masks.dtype), batch.masks, config.dice_weight)
        for head, features in ((model.head, causal_features), (model.confounding_head, confounding_features))
    )
    means = _means(masks)
    total = (
        game.causal_weight * causal + sign * game.confounding_weight * confounding + _mask_budget_loss(means, config)
    )
    return Losses(total, causal.detach(), confounding.detach(), means.detach())


def _aggregate(neck: CausalNeck, levels: Levels, masks: Levels) -> Tensor:
    features: Tensor = neck.aggregate(torch.cat([q * mask for q, mask in zip(levels, masks, strict=True)], dim=1))
    return features


def _means(masks: Levels) -> Tensor:
    return torch.stack([mask.to(torch.promote_types(mask.dtype, torch.float32)).mean() for mask in masks])


def _mask_budget_loss(means: Tensor, config: TrainConfig) -> Tensor:
    """Return the weighted squared distance of the mask means from the budget, or zero without a budget."""
    if config.game.mask_budget is None:
        return means.new_zeros(())
    return config.game.mask_budget_weight * (means - config.game.mask_budget).square().sum()


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]


@contextmanager
def _freeze_running_stats(norms: Sequence[_BatchNorm], freeze: bool) -> Iterator[None]:
    """Do not update the batch norms' running statistics within the block; they still normalize by the batch."""
    tracking = [norm for norm in norms if freeze and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


class _GradientReversal(torch.autograd.Function):
    """Gradient reversal layer: identity with a negated gradient (Ganin & Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def trainable_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the modules' parameters that require a gradient."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]
