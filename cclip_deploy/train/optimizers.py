"""Parameter groups, learning-rate schedule, frozen stages and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.game import has_adversary, maskers_of, trainable_parameters


def freeze(model: CausalCLIPSeg, config: TrainConfig) -> list[nn.Module]:
    """Disable gradients of the recipe's frozen stages and of an unused head; return the frozen modules."""
    frozen = [module for stage in config.frozen for module in _stage(model, stage)]
    unused = [model.confounding_head] if config.mode == "off" else []
    for module in [*frozen, *unused]:
        module.requires_grad_(False)
    return frozen


def start_training_mode(model: nn.Module, frozen: list[nn.Module]) -> None:
    """Set training mode, except for frozen modules, whose batch-norm statistics must not change."""
    model.train()
    for module in frozen:
        module.eval()


def make_optimizers(model: CausalCLIPSeg, config: TrainConfig) -> list[Optimizer]:
    """Return an AdamW optimizer for the main step, and a second one for the maskers in mode "alternating".

    Towers and maskers have their own learning rates. A group's "full_rate" is its rate before the schedule's factor.
    """
    maskers = trainable_parameters(maskers_of(model))
    towers = trainable_parameters([model.image_tower, model.text_tower])
    apart = {id(p) for p in (*maskers, *towers)}
    rest = [p for p in trainable_parameters([model]) if id(p) not in apart]
    groups = [(towers, config.tower_rate), (rest, 1.0)]
    masker_group = (maskers, config.game.masker_rate)
    if has_adversary(config):
        return [_adamw(groups, config), _adamw([masker_group], config)]
    return [_adamw([*groups, masker_group], config)]


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Return the factor on the full learning rate at a step, counted from 0: linear warmup, then the schedule."""
    warmup_steps = round(config.warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "step":
        return 0.1 if step >= 0.7 * steps else 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its full rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["full_rate"]


def make_average(model: CausalCLIPSeg, config: TrainConfig) -> AveragedModel | None:
    """Return the exponential moving average of weights and batch-norm statistics, or None if the recipe has none."""
    if not config.average_decay:
        return None
    average = get_ema_multi_avg_fn(config.average_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _stage(model: CausalCLIPSeg, stage: str) -> list[nn.Module]:
    tower = model.image_tower
    if stage == "text_tower":
        return [model.text_tower]
    if stage == "stem":
        return [getattr(tower, f"{part}{number}") for part in ("conv", "bn") for number in (1, 2, 3)]
    return [getattr(tower, stage)]


def _adamw(groups: list[tuple[list[nn.Parameter], float]], config: TrainConfig) -> AdamW:
    # A fused AdamW unscales float16 gradients itself, but clipping needs them unscaled before.
    fused = config.devices.precision != "16-mixed"
    full: list[dict[str, Any]] = [
        {"params": parameters, "full_rate": config.learning_rate * factor}
        for parameters, factor in groups
        if parameters
    ]
    return AdamW(full, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
