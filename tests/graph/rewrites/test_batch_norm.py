"""A folded convolution against convolution and batch norm, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.batch_norm import FoldBatchNorm, convolution_refusal, norm_refusal, scale_and_shift
from cclip_deploy.model.neck import convolution_block
from tests.numerics import random_map, randomized, relative_error


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    batch=st.integers(1, 3),
    size=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_convolution_equals_convolution_and_norm(
    height: int, width: int, batch: int, size: int, stride: int, groups: int, bias: bool, seed: int
) -> None:
    convolution = nn.Conv2d(4, 6, size, stride=stride, padding=size // 2, groups=groups, bias=bias)
    module = randomized(nn.Sequential(convolution, nn.BatchNorm2d(6, eps=1e-2), nn.ReLU()), seed)
    folded = FoldBatchNorm()(module)
    x = random_map(batch, 4, height, width, seed=seed)
    assert relative_error(folded(x), module(x)) <= 1e-12
    assert [type(part).__name__ for part in folded.children()] == ["Conv2d", "ReLU"]


def test_scale_and_shift_are_the_norm_s_formula() -> None:
    norm = nn.BatchNorm2d(1, eps=0.25).eval()
    for tensor, value in ((norm.weight, 6.0), (norm.bias, 1.0), (norm.running_mean, 4.0), (norm.running_var, 8.75)):
        nn.init.constant_(tensor, value)  # type: ignore[arg-type]
    scale, shift = scale_and_shift(norm)  # 6 / sqrt(9) and 1 - 4 * 2
    assert (scale.item(), shift.item()) == (2.0, -7.0)


def test_float32_weights_are_folded_in_float64_and_stay_float32() -> None:
    exact = randomized(convolution_block(64, 8, 3))
    module = copy.deepcopy(exact).float()
    folded = FoldBatchNorm()(module)
    assert folded[0].weight.dtype is folded[0].bias.dtype is torch.float32  # type: ignore[index]
    x = random_map(1, 64, 5, 5)
    assert relative_error(folded(x.float()), exact(x)) <= 1e-6


def test_the_original_module_is_unchanged_and_the_folded_one_is_frozen() -> None:
    module = randomized(convolution_block(3, 5, 3)).requires_grad_(True)
    before = copy.deepcopy(module.state_dict())
    folded = FoldBatchNorm()(module)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    assert isinstance(module[1], nn.BatchNorm2d)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (convolution_block(3, 5, 3), "training mode, so its statistics depend on the batch; call eval"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)).eval(), "no running stat"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)).eval(), "no weight and bias"),
        (nn.Sequential(nn.Conv2d(3, 5, 3, padding_mode="reflect"), nn.BatchNorm2d(5)).eval(), "pads with reflect"),
        (nn.Sequential(nn.Conv2d(3, 5, 3)).eval(), "does not begin with a convolution and a batch norm"),
        (nn.Sequential().eval(), "does not begin with a convolution and a batch norm"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)).eval(), "does not begin with a convolution and a"),
        (nn.Sequential(nn.ConvTranspose2d(3, 5, 3), nn.BatchNorm2d(5)).eval(), "does not begin with a convolution"),
    ],
)
def test_unsupported_modules_are_refused_with_the_reason(module: nn.Sequential, reason: str) -> None:
    with pytest.raises(RewriteRefused, match=f"FoldBatchNorm cannot rewrite Sequential: .*{reason}"):
        FoldBatchNorm()(module)


def test_only_a_batch_norm_is_accepted_as_norm() -> None:
    assert norm_refusal(nn.Identity()) == "its convolution is not followed by a batch norm"
    assert norm_refusal(nn.BatchNorm2d(3).eval()) is None


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), None),
        (nn.Conv2d(4, 4, 1), "no 3x3 convolution"),
        (nn.Linear(4, 4), "no 3x3 convolution"),
        (nn.Conv2d(4, 4, (3, 1), padding=1), "no 3x3 convolution"),
        (nn.Conv2d(4, 4, 3, padding=1, stride=2), "a stride, a dilation or groups"),
        (nn.Conv2d(4, 4, 3, padding=1, dilation=2), "a stride, a dilation or groups"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "a stride, a dilation or groups"),
        (nn.Conv2d(4, 4, 3), "does not pad 1 zeros"),
        (nn.Conv2d(4, 4, 3, padding=2), "does not pad 1 zeros"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"), "does not pad 1 zeros"),
    ],
)
def test_unsupported_convolutions_are_described(convolution: nn.Module, reason: str | None) -> None:
    refusal = convolution_refusal(convolution, 3)
    assert refusal is None if reason is None else refusal is not None and reason in refusal
