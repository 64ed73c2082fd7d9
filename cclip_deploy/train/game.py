"""The min-max game between the maskers and the rest of the network, one objective a player (Chen et al., MICCAI 2024).

off          L_causal                                   everything but the confounding head
joint        w_c L_causal + w_f L_confounding           everything
alternating  w_c L_causal + w_f L_confounding           everything but the maskers, whose masks are held
             w_c L_causal - w_f L_confounding           the maskers alone, in steps of their own
reversal     w_c L_causal + w_f L_confounding           everything, in one step: the maskers see only detached
                                                        features and get L_confounding's gradient with its sign turned

In "alternating" the running statistics of a batch norm follow the steps of its own player (`Game.own_step_statistics`):
the other player's steps normalize by the batch as always and leave them alone.
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
    """B images on the device, each with P prompts."""

    images: Tensor  # (B, 3, H, W)
    tokens: Tensor  # (B, P, L)
    masks: Tensor  # (B, P, H, W), 0 or 1, of the images' type


@dataclass(frozen=True)
class Losses:
    """What one player minimizes, and what it is made of."""

    total: Tensor
    causal: Tensor
    confounding: Tensor | None
    mask_means: Tensor  # (3,), of levels 3, 4, 5


def has_adversary(config: TrainConfig) -> bool:
    """Whether the maskers take steps of their own."""
    return config.mode == "alternating"


def maskers_of(model: CausalCLIPSeg) -> list[nn.Module]:
    """The three maskers, the one player."""
    return [model.neck.masker3, model.neck.masker4, model.neck.masker5]


def main_losses(model: CausalCLIPSeg, batch: TensorBatch, config: TrainConfig, epoch: int) -> Losses:
    """The objective of everything but the maskers; in every mode but "alternating" it is theirs too."""
    levels = model.neck.levels(model.image_tower(batch.images))
    states = prompt_states(model, batch.tokens)
    if config.mode == "off":
        masks = model.neck.masks(levels)
        return _one_head(model, levels, masks, states, batch, config)
    at_one = epoch < config.game.masks_at_one_epochs
    masks = _main_masks(model, levels, config, at_one)
    against = tuple(_Reversed.apply(mask) for mask in masks) if config.mode == "reversal" and not at_one else masks
    # With both masks at one the confounding branch sees everything too, so its share is not one minus the mask.
    shares = masks if at_one else tuple(1 - mask for mask in against)
    return _both_heads(model, levels, masks, shares, states, batch, config, sign=1.0)


def masker_losses(model: CausalCLIPSeg, batch: TensorBatch, config: TrainConfig) -> Losses:
    """The maskers' own objective, after a fresh forward pass; nothing but the maskers gets a gradient to keep."""
    own = {norm for masker in maskers_of(model) for norm in _batch_norms(masker)}
    others = [norm for norm in _batch_norms(model) if norm not in own]
    with _held_statistics(others, config.game.own_step_statistics):
        with torch.no_grad():
            levels = model.neck.levels(model.image_tower(batch.images))
            states = prompt_states(model, batch.tokens)
        masks = model.neck.masks(levels)
        shares = tuple(1 - mask for mask in masks)
        return _both_heads(model, levels, masks, shares, states, batch, config, sign=-1.0)  # type: ignore[arg-type]


@contextmanager
def only_maskers_learn(model: CausalCLIPSeg) -> Iterator[None]:
    """Within the block no other parameter requires a gradient, so none is computed for it."""
    own = {id(p) for masker in maskers_of(model) for p in masker.parameters()}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
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
    with torch.no_grad(), _held_statistics(norms, config.game.own_step_statistics):
        return model.neck.masks(detached)


def _one_head(
    model: CausalCLIPSeg, levels: Levels, masks: Levels, states: Tensor, batch: TensorBatch, config: TrainConfig
) -> Losses:
    logits = head_logits(model.head, _mix(model.neck, levels, masks), states)
    causal = dice_bce(logits.to(batch.masks.dtype), batch.masks, config.dice_weight)
    means = _means(masks)
    return Losses(causal + _budget(means, config), causal.detach(), None, means.detach())


def _both_heads(
    model: CausalCLIPSeg, levels: Levels, masks: Levels, shares: Levels, states: Tensor, batch: TensorBatch,
    config: TrainConfig, *, sign: float,
) -> Losses:  # fmt: skip
    """Causal features are levels x masks, confounding ones levels x shares; `sign` is that of the second loss."""
    game = config.game
    causal_features = _mix(model.neck, levels, masks)
    with _held_statistics(_batch_norms(model.neck.aggregate), game.causal_statistics_only):
        confounding_features = _mix(model.neck, levels, shares)
    causal, confounding = (
        dice_bce(head_logits(head, features, states).to(batch.masks.dtype), batch.masks, config.dice_weight)
        for head, features in ((model.head, causal_features), (model.confounding_head, confounding_features))
    )
    means = _means(masks)
    total = game.causal_weight * causal + sign * game.confounding_weight * confounding + _budget(means, config)
    return Losses(total, causal.detach(), confounding.detach(), means.detach())


def _mix(neck: CausalNeck, levels: Levels, shares: Levels) -> Tensor:
    mixed: Tensor = neck.aggregate(torch.cat([q * share for q, share in zip(levels, shares, strict=True)], dim=1))
    return mixed


def _means(masks: Levels) -> Tensor:
    return torch.stack([mask.to(torch.promote_types(mask.dtype, torch.float32)).mean() for mask in masks])


def _budget(means: Tensor, config: TrainConfig) -> Tensor:
    """The squared distance of the masks' means from their budget, or zero."""
    if config.game.mask_budget is None:
        return means.new_zeros(())
    return config.game.mask_budget_weight * (means - config.game.mask_budget).square().sum()


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]


@contextmanager
def _held_statistics(norms: Sequence[_BatchNorm], held: bool) -> Iterator[None]:
    """Within the block batch norms normalize as ever, but their running means and variances stay."""
    tracking = [norm for norm in norms if held and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient has its sign turned (Ganin & Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules that are to learn."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]
