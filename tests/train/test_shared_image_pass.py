"""The training forward pass against the published form, in float64: logits, losses, gradients and statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.game import TensorBatch, main_losses
from cclip_deploy.train.losses import dice_bce
from cclip_deploy.train.shared_image_pass import head_logits, multi_prompt_logits
from tests.numerics import randomized

LIMIT = 1e-10


def network() -> CausalCLIPSeg:
    """Return a randomized network in training mode."""
    return randomized(CausalCLIPSeg(TINY)).train().requires_grad_(True)


def batch_of(images: int, prompts: int) -> TensorBatch:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, 64, 96, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 49000, (images, prompts, 9), generator=generator)
    tokens[:, :, -1] = 49407
    masks = (torch.rand(images, prompts, 64, 96, generator=generator) > 0.7).double()
    return TensorBatch(pictures, tokens, masks)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that gradients and batch-norm statistics agree within LIMIT."""
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            pairs.append((name, one.grad, other.grad))
    largest = max(float(other.norm()) for _, _, other in pairs)
    for name, one, other in pairs:
        # A bias before a batch norm has a gradient of rounding errors, so it is compared with the largest gradient.
        assert float((one - other).norm()) <= LIMIT * max(float(other.norm()), 1e-4 * largest), name
    for (name, one), other in zip(actual.named_buffers(), expected.buffers(), strict=True):
        assert float((one - other).double().norm()) <= LIMIT * float(other.double().norm()), name


def test_both_heads_match_the_published_form() -> None:
    fast, batch = network(), batch_of(2, 1)
    plain, start = copy.deepcopy(fast), copy.deepcopy(fast)
    losses = main_losses(fast, batch, TrainConfig(mode="joint", dice_weight=0.3), epoch=0)
    torch.autograd.backward(losses.total)
    logits = plain(batch.images, batch.tokens[:, 0])
    expected = [dice_bce(branch, batch.masks, 0.3) for branch in logits]
    total = 0.5 * expected[0] + 0.5 * expected[1]
    torch.autograd.backward(total)
    assert float(losses.total.detach()) == pytest.approx(float(total.detach()), rel=LIMIT)
    assert losses.confounding is not None
    for loss, branch in ((losses.causal, expected[0]), (losses.confounding, expected[1])):
        assert float(loss) == pytest.approx(float(branch.detach()), rel=LIMIT)
    assert_same(fast, plain)
    for head in (fast.head, fast.confounding_head):
        assert not torch.equal(head.block2[1].running_var, start.head.block2[1].running_var)


def test_one_head_matches_the_published_form() -> None:
    fast, batch = network(), batch_of(2, 1)
    plain = copy.deepcopy(fast)
    torch.autograd.backward(main_losses(fast, batch, TrainConfig(), epoch=0).total)
    torch.autograd.backward(dice_bce(plain.causal_logits(batch.images, batch.tokens[:, 0]), batch.masks))
    assert_same(fast, plain)


def test_a_batch_of_one_image_matches_the_published_form() -> None:
    fast, batch = network(), batch_of(1, 1)
    plain = copy.deepcopy(fast)
    torch.autograd.backward(main_losses(fast, batch, TrainConfig(), epoch=0).total)
    torch.autograd.backward(dice_bce(plain.causal_logits(batch.images, batch.tokens[:, 0]), batch.masks))
    assert_same(fast, plain)


def test_prompts_that_share_an_image_pass_match_single_rows() -> None:
    model, batch = network().eval(), batch_of(2, 3)
    with torch.inference_mode():
        grouped = multi_prompt_logits(model, batch.images, batch.tokens)
        rows = model.causal_logits(batch.images.repeat_interleave(3, dim=0), batch.tokens.flatten(0, 1))
    assert grouped.shape == (2, 3, 64, 96)
    assert (grouped.flatten(0, 1).unsqueeze(1) - rows).norm() < 1e-12 * rows.norm()


def test_gradients_of_a_shared_image_pass_match_those_of_single_rows() -> None:
    """Repeating images does not change batch statistics."""
    head = network().head
    plain = copy.deepcopy(head)
    features = torch.randn(2, 64, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    states = torch.randn(2, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward(head_logits(head, features, states).square().mean())
    rows = plain(features.repeat_interleave(3, dim=0), states.flatten(0, 1))
    torch.autograd.backward(rows.square().mean())
    for one, other in zip(head.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() <= LIMIT * other.grad.norm()
