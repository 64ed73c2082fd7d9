"""Tests of learning rates, schedules, frozen stages and the moving average."""

from __future__ import annotations

import math

import pytest
import torch

from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import Game, TrainConfig
from cclip_deploy.train.optimizers import (
    freeze,
    learning_rate_factor,
    make_average,
    make_optimizers,
    set_learning_rates,
    start_training_mode,
)


def test_the_learning_rate_warms_up_and_follows_its_schedule() -> None:
    cosine = [learning_rate_factor(step, 100, TrainConfig(warmup=0.1)) for step in range(100)]
    assert cosine[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    step = [learning_rate_factor(step, 100, TrainConfig(warmup=0, schedule="step")) for step in range(100)]
    assert step == [1.0] * 70 + [0.1] * 30


def test_every_parameter_is_in_one_group_with_the_rate_of_its_part() -> None:
    model = CausalCLIPSeg(TINY)
    config = TrainConfig(mode="joint", learning_rate=1.0, tower_rate=0.1, game=Game(masker_rate=3.0))
    optimizers = make_optimizers(model, config)
    set_learning_rates(optimizers, 0.5)
    rates = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(optimizers) == 1
    assert len(rates) == sum(len(group["params"]) for group in optimizers[0].param_groups)
    for name, parameter in model.named_parameters():
        want = 0.05 if "tower" in name else 1.5 if "masker" in name else 0.5
        assert rates[id(parameter)] == pytest.approx(want), name


def test_alternating_has_a_second_optimizer_for_the_maskers() -> None:
    model = CausalCLIPSeg(TINY)
    main, maskers = make_optimizers(model, TrainConfig(mode="alternating"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_maskers = {names[id(p)] for group in maskers.param_groups for p in group["params"]}
    of_main = {names[id(p)] for group in main.param_groups for p in group["params"]}
    assert of_maskers == {name for name in names.values() if "masker" in name}
    assert of_main == set(names.values()) - of_maskers


def test_towers_move_by_their_own_learning_rate() -> None:
    """AdamW's first step moves every weight by its learning rate, independent of the size of the gradient."""
    model = CausalCLIPSeg(TINY)
    config = TrainConfig(learning_rate=1e-3, tower_rate=0.1, weight_decay=0.0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model, config)
    optimizers = make_optimizers(model, config)
    set_learning_rates(optimizers, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizers[0].step()
    moved = model.state_dict()
    for name, share in (
        ("image_tower.conv1.weight", 0.1),
        ("neck.project4.0.weight", 1.0),
        ("confounding_head.mix.bias", 0),
    ):
        step = (moved[name] - start[name]).abs().median().item()
        assert step == pytest.approx(share * config.learning_rate, rel=0.01)


def test_frozen_stages_keep_weights_and_statistics() -> None:
    model = CausalCLIPSeg(TINY)
    config = TrainConfig(frozen=("stem", "layer1", "text_tower"))
    frozen = freeze(model, config)
    start_training_mode(model, frozen)
    names = ("image_tower.conv", "image_tower.bn", "image_tower.layer1.", "text_tower.", "confounding_head.")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(names), name
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.image_tower(torch.randn(2, 3, 64, 64))
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {".".join(name.split(".")[:2]) for name in changed} == {
        f"image_tower.{stage}" for stage in ("layer2", "layer3", "layer4", "attnpool")
    }


def test_the_average_tracks_weights_and_statistics_and_is_none_without_decay() -> None:
    model = CausalCLIPSeg(TINY)
    assert make_average(model, TrainConfig()) is None
    average = make_average(model, TrainConfig(average_decay=0.75))
    assert average is not None
    average.update_parameters(model)
    first = model.head.mix.bias.detach().clone()
    with torch.no_grad():
        model.head.mix.bias += 1
        model.neck.aggregate[1].running_mean += 1
    average.update_parameters(model)
    assert torch.allclose(average.module.head.mix.bias, first + 0.25)
    assert torch.allclose(average.module.neck.aggregate[1].running_mean, torch.full((64,), 0.25))
