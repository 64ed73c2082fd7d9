"""Gradients of every mode against the published forward pass and autograd, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import Game, TrainConfig
from cclip_deploy.train.game import TensorBatch, main_losses, masker_losses, maskers_of, train_only_maskers
from cclip_deploy.train.losses import dice_bce
from tests.train.test_shared_image_pass import batch_of, network

GAME = Game(causal_weight=0.7, confounding_weight=0.2)


@pytest.fixture(scope="module")
def batch() -> TensorBatch:
    return batch_of(2, 1)


def masker_names(model: CausalCLIPSeg) -> set[str]:
    return {f"neck.masker{level}.{name}" for level in (3, 4, 5) for name, _ in model.neck.masker3.named_parameters()}


def gradients(model: CausalCLIPSeg, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_losses(model: CausalCLIPSeg, batch: TensorBatch, *, detach: bool = False) -> tuple[Tensor, Tensor]:
    """Compute both losses with the network's own modules; `detach` detaches the maskers' input."""
    levels = model.neck.levels(model.image_tower(batch.images))
    masks = model.neck.masks(tuple(q.detach() for q in levels) if detach else levels)  # type: ignore[arg-type]
    state = model.text_tower(batch.tokens[:, 0])
    features = [
        torch.cat([q * m for q, m in zip(levels, shares, strict=True)], 1) for shares in (masks, [1 - m for m in masks])
    ]
    logits = (
        head(model.neck.aggregate(mixed), state)
        for head, mixed in zip((model.head, model.confounding_head), features, strict=True)
    )
    causal, confounding = (dice_bce(of_branch, batch.masks) for of_branch in logits)
    return causal, confounding


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], names: set[str]) -> None:
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name in names:
        error = float((actual[name] - expected[name]).norm())
        assert error <= 1e-10 * max(float(expected[name].norm()), 1e-4 * largest), name


def test_alternating_detaches_the_masks_in_the_main_step(batch: TensorBatch) -> None:
    model = network()
    plain = copy.deepcopy(model)
    got = gradients(model, main_losses(model, batch, TrainConfig(mode="alternating", game=GAME), 0).total)
    causal, confounding = plain_losses(plain, batch, detach=True)
    want = gradients(plain, 0.7 * causal + 0.2 * confounding)
    others = set(want) - masker_names(model)
    assert set(got) == others
    assert_close(got, want, others)


def test_the_masker_step_negates_the_confounding_loss_and_trains_only_maskers(batch: TensorBatch) -> None:
    model = network()
    plain = copy.deepcopy(model)
    with train_only_maskers(model):
        got = gradients(model, masker_losses(model, batch, TrainConfig(mode="alternating", game=GAME)).total)
    causal, confounding = plain_losses(plain, batch)
    want = gradients(plain, 0.7 * causal - 0.2 * confounding)
    assert set(got) == masker_names(model)
    assert_close(got, want, masker_names(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_reversal_trains_both_sides_in_one_step(batch: TensorBatch) -> None:
    model = network()
    plain = copy.deepcopy(model)
    got = gradients(model, main_losses(model, batch, TrainConfig(mode="reversal", game=GAME), 0).total)
    causal, confounding = plain_losses(plain, batch, detach=True)
    everything = gradients(plain, 0.7 * causal + 0.2 * confounding)
    causal, confounding = plain_losses(plain, batch, detach=True)
    turned = gradients(plain, 0.7 * causal - 0.2 * confounding)
    assert_close(got, turned, masker_names(model))
    assert_close(got, everything, set(everything) - masker_names(model))


def test_off_does_not_train_the_confounding_head(batch: TensorBatch) -> None:
    model = network()
    losses = main_losses(model, batch, TrainConfig(), 0)
    got = gradients(model, losses.total)
    assert losses.confounding is None
    assert {name.split(".")[0] for name in got} == {"image_tower", "text_tower", "neck", "head"}
    assert masker_names(model) <= set(got)


@pytest.mark.parametrize("mode", ["joint", "alternating", "reversal"])
def test_with_masks_at_one_both_branches_use_all_features(batch: TensorBatch, mode: str) -> None:
    model = network()
    model.confounding_head.load_state_dict(model.head.state_dict())
    config = TrainConfig.model_validate({"mode": mode, "game": {"masks_at_one_epochs": 2}})
    early, late = main_losses(model, batch, config, 1), main_losses(model, batch, config, 2)
    assert early.mask_means.tolist() == [1, 1, 1]
    assert early.confounding is not None
    assert float(early.causal) == pytest.approx(float(early.confounding), rel=1e-12)
    assert late.confounding is not None
    assert float(late.causal) != pytest.approx(float(late.confounding), rel=1e-3)
    assert all(0 < mean < 1 for mean in late.mask_means.tolist())


@pytest.mark.parametrize("mode", ["off", "joint", "reversal"])
def test_the_mask_budget_adds_squared_distances(batch: TensorBatch, mode: str) -> None:
    model = network().eval()
    budget = {"mask_budget": 0.25, "mask_budget_weight": 3.0}
    without, having = (
        main_losses(model, batch, TrainConfig.model_validate({"mode": mode, "game": game}), 0) for game in ({}, budget)
    )
    distance = sum((mean - 0.25) ** 2 for mean in without.mask_means.tolist())
    assert float((having.total - without.total).detach()) == pytest.approx(3 * distance, rel=1e-9)


def test_only_the_masker_step_has_gradients_of_the_budget(batch: TensorBatch) -> None:
    model = network()
    config = TrainConfig(mode="alternating", game=Game(causal_weight=0, confounding_weight=0, mask_budget=0.9))
    assert not main_losses(model, batch, config, 0).total.requires_grad or not (
        set(gradients(model, main_losses(model, batch, config, 0).total)) & masker_names(model)
    )
    biases = gradients(model, masker_losses(model, batch, config).total)
    # The mean of the masks is about 0.5; a higher bias of the last norm moves it towards 0.9.
    assert all((biases[f"neck.masker{level}.norm.bias"] < 0).all() for level in (3, 4, 5))


@pytest.mark.parametrize("causal_only", [True, False])
def test_the_shared_block_can_update_its_statistics_from_causal_features_only(
    batch: TensorBatch, causal_only: bool
) -> None:
    model = network()
    plain = copy.deepcopy(model)
    game = Game(causal_statistics_only=causal_only)
    losses = main_losses(model, batch, TrainConfig(mode="joint", game=game), 0)
    if causal_only:
        plain.neck.causal_features(plain.image_tower(batch.images))
    else:
        plain.neck(plain.image_tower(batch.images))
    for name in ("running_mean", "running_var"):
        got, want = (getattr(network.neck.aggregate[1], name) for network in (model, plain))
        assert torch.allclose(got, want, rtol=1e-12)
    assert model.neck.aggregate[1].momentum == 0.1
    other = main_losses(copy.deepcopy(plain), batch, TrainConfig(mode="joint"), 0)
    assert float(losses.total.detach()) == pytest.approx(float(other.total.detach()), rel=1e-10)


def statistics(model: CausalCLIPSeg) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("trained", ["the rest", "the maskers"])
def test_batch_norms_update_statistics_only_in_steps_that_train_them(
    batch: TensorBatch, trained: str, own: bool
) -> None:
    model = network()
    before, plain = statistics(model), copy.deepcopy(model)
    config = TrainConfig(mode="alternating", game=Game(own_step_statistics=own))
    losses = main_losses(model, batch, config, 0) if trained == "the rest" else masker_losses(model, batch, config)
    causal, _ = plain_losses(plain, batch)
    assert float(losses.causal) == pytest.approx(float(causal.detach()), rel=1e-10)
    maskers = {name for name in before if name.startswith("neck.masker")}
    assert len(maskers) == 3 * 4 * 3
    moved = set(before) if not own else maskers if trained == "the maskers" else set(before) - maskers
    after, everything = statistics(model), statistics(plain)
    for name, tensor in after.items():
        if name in moved:
            assert not torch.equal(tensor, before[name]), name
            assert torch.allclose(tensor, everything[name], rtol=1e-10, atol=1e-13), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert all(norm.track_running_stats for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


def test_frozen_statistics_do_not_change_in_the_masker_step(batch: TensorBatch) -> None:
    model = network()
    model.image_tower.eval()
    plain = copy.deepcopy(model)
    losses = masker_losses(model, batch, TrainConfig(mode="alternating"))
    causal, _ = plain_losses(plain, batch)
    assert float(losses.causal) == pytest.approx(float(causal.detach()), rel=1e-10)


def test_there_are_three_maskers() -> None:
    assert len({id(masker) for masker in maskers_of(network())}) == 3
