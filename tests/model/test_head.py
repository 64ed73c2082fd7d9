"""Mask head, compared with loops over samples, pixels and taps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cclip_deploy.model.config import TINY
from cclip_deploy.model.head import MaskHead, prompt_kernel_rows
from tests.model.oracles import block
from tests.numerics import random_map, randomized, relative_error


@pytest.fixture(scope="module")
def head() -> MaskHead:
    return randomized(MaskHead(TINY), seed=5)


def quadrupled(x: Tensor) -> Tensor:
    """Bilinear x4 at half-pixel centers, pixel by pixel, the border repeated."""
    for axis in (2, 3):
        size, rows = x.shape[axis], []
        for row in range(4 * size):
            place = max((row + 0.5) / 4 - 0.5, 0.0)
            low = int(place)
            high = min(low + 1, size - 1)
            rows.append(x.select(axis, low) * (1 - place + low) + x.select(axis, high) * (place - low))
        x = torch.stack(rows, dim=axis)
    return x


@pytest.mark.parametrize("hw", [(1, 1), (1, 3), (2, 3)])
def test_upsample_is_bilinear_4x_twice_each_before_a_block(head: MaskHead, hw: tuple[int, int]) -> None:
    features = random_map(2, 64, *hw)
    expected = block(quadrupled(block(quadrupled(features), head.block1)), head.block2)
    assert expected.shape == (2, 32, 16 * hw[0], 16 * hw[1])
    assert relative_error(head.upsample(features), expected) <= 1e-12


def test_prompt_s_numbers_are_channel_by_channel_3x3_kernels_and_the_bias_last(head: MaskHead) -> None:
    state = random_map(3, 64)
    values = state @ head.prompt.weight.T + head.prompt.bias
    kernel = head.kernel(state)
    assert kernel.weight.shape == (3, 32, 3, 3)
    for channel, y, x in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (5, 2, 1), (31, 2, 2)):
        torch.testing.assert_close(kernel.weight[:, channel, y, x], values[:, 9 * channel + 3 * y + x])
    torch.testing.assert_close(kernel.bias, values[:, -1])


def test_rows_of_a_kernel_are_its_taps(head: MaskHead) -> None:
    weight = random_map(2, 5, 3, 3)
    rows = prompt_kernel_rows(weight)
    assert rows.shape == (2, 9, 5)
    assert torch.equal(rows[1, 3 * 2 + 1], weight[1, :, 2, 1])


def test_every_image_is_convolved_with_the_kernel_of_its_own_prompt(head: MaskHead) -> None:
    upsampled, state = random_map(3, 32, 4, 5), random_map(3, 64)
    values = state @ head.prompt.weight.T + head.prompt.bias
    expected = torch.empty(3, 1, 4, 5, dtype=torch.float64)
    for sample in range(3):
        mixed = torch.einsum("oi,ihw->ohw", head.mix.weight.flatten(1), upsampled[sample])
        padded = functional.pad(mixed + head.mix.bias[:, None, None], (1, 1, 1, 1))  # type: ignore[index]
        kernel = values[sample, :-1].reshape(32, 3, 3)
        for row in range(4):
            for column in range(5):
                window = padded[:, row : row + 3, column : column + 3]
                expected[sample, 0, row, column] = (window * kernel).sum() + values[sample, -1]
    assert relative_error(head.apply_prompt(upsampled, state), expected) <= 1e-12


def test_logits_come_from_the_upsampled_features(head: MaskHead) -> None:
    features, state = random_map(2, 64, 2, 3), random_map(2, 64)
    logits = head(features, state)
    assert logits.shape == (2, 1, 32, 48)
    assert torch.equal(logits, head.apply_prompt(head.upsample(features), state))
