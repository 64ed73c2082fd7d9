"""The last 1x1 convolution folded into the prompt's kernel, against the original head, in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.prompt_kernel import FoldedKernel, FoldLastConvolution
from cclip_deploy.model.config import TINY
from cclip_deploy.model.head import MaskHead
from tests.numerics import random_map, randomized, relative_error

HEAD = randomized(MaskHead(dataclasses.replace(TINY, feature_width=6)), seed=1)


def convolved(upsampled: Tensor, folded: FoldedKernel) -> Tensor:
    """Sum nine taps for each pixel, each with its bias; taps outside the image are skipped."""
    batch, _, height, width = upsampled.shape
    logits = torch.zeros(batch, 1, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            logits[:, 0, y, x] = folded.bias
            for tap in range(9):
                row, column = y + tap // 3 - 1, x + tap % 3 - 1
                if 0 <= row < height and 0 <= column < width:
                    pixel = (upsampled[:, :, row, column] * folded.kernel[:, tap]).sum(1)
                    logits[:, 0, y, x] += pixel + folded.tap_bias[:, tap]
    return logits


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_folded_kernel_equals_the_head(height: int, width: int, batch: int, seed: int) -> None:
    upsampled, state = random_map(batch, 6, height, width, seed=seed), random_map(batch, 64, seed=seed)
    folded = FoldLastConvolution()(HEAD)(state)
    assert relative_error(convolved(upsampled, folded), HEAD.apply_prompt(upsampled, state)) <= 1e-12


def test_folded_numbers_are_k_w_and_k_b() -> None:
    state = random_map(4, 64)
    folded, kernel = FoldLastConvolution()(HEAD)(state), HEAD.kernel(state)
    mix, bias = HEAD.mix.weight[:, :, 0, 0], HEAD.mix.bias
    assert [tuple(part.shape) for part in folded] == [(4, 9, 6), (4, 9), (4,)]
    assert relative_error(folded.kernel, torch.einsum("poyx,oi->pyxi", kernel.weight, mix).flatten(1, 2)) <= 1e-12
    assert relative_error(folded.tap_bias, torch.einsum("poyx,o->pyx", kernel.weight, bias).flatten(1)) <= 1e-12
    assert relative_error(folded.bias, kernel.bias) <= 1e-12


def test_float32_weights_are_folded_in_float64_and_stay_float32() -> None:
    folded = FoldLastConvolution()(copy.deepcopy(HEAD).float())
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    state = random_map(3, 64)
    assert relative_error(folded(state.float()).kernel, FoldLastConvolution()(HEAD)(state).kernel) <= 1e-6


def test_the_original_head_is_unchanged() -> None:
    head = copy.deepcopy(HEAD).requires_grad_(True)
    before = copy.deepcopy(head.state_dict())
    folded = FoldLastConvolution()(head)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (nn.Conv2d(6, 6, 3, padding=1), "no 1x1 convolution"),
        (nn.Conv2d(6, 6, 1, groups=2), "groups"),
        (nn.Conv2d(6, 6, 1, padding=1), "does not pad 0 zeros"),
        (nn.Conv2d(6, 6, 1, stride=2), "stride"),
        (nn.Conv2d(6, 6, 1, bias=False), "has no bias"),
    ],
)
def test_an_unsupported_head_is_refused_with_the_reason(mix: nn.Conv2d, reason: str) -> None:
    head = copy.deepcopy(HEAD)
    head.mix = mix
    with pytest.raises(RewriteRefused, match=f"FoldLastConvolution cannot rewrite MaskHead: .*{reason}"):
        FoldLastConvolution()(head)
