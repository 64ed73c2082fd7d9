"""Channels mixed before the upsampling against convolution after it, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.interpolation import Bands, MixBeforeInterpolation, shifted_matrices
from cclip_deploy.model.neck import convolution_block
from tests.numerics import random_map, randomized, relative_error

SIDES = st.integers(1, 22)


def rewritten_block(block: nn.Sequential, hw: tuple[int, int], scale: int = 4) -> Callable[[Tensor], Tensor]:
    """Return the rewritten block as a function of maps with channels first."""
    rewritten = MixBeforeInterpolation(hw, scale)(block)
    return lambda x: rewritten(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def plainly(block: nn.Module, x: Tensor, scale: int = 4) -> Tensor:
    """Interpolate, then run convolution, norm and ReLU at full resolution, as published."""
    out: Tensor = block(functional.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False))
    return out


@settings(max_examples=25, deadline=None)
@given(
    height=SIDES, width=SIDES, batch=st.integers(1, 3), scale=st.sampled_from([2, 3, 4]),
    widths=st.sampled_from([(1, 1), (3, 5), (6, 2)]), seed=st.integers(0, 99),
)  # fmt: skip
@example(height=1, width=1, batch=2, scale=4, widths=(3, 5), seed=0)
@example(height=1, width=7, batch=2, scale=4, widths=(3, 5), seed=0)
@example(height=7, width=1, batch=2, scale=4, widths=(3, 5), seed=0)
@example(height=2, width=2, batch=1, scale=4, widths=(3, 5), seed=0)
def test_mixing_first_equals_interpolating_first(
    height: int, width: int, batch: int, scale: int, widths: tuple[int, int], seed: int
) -> None:
    block = randomized(convolution_block(*widths, 3), seed)
    x = random_map(batch, widths[0], height, width, seed=seed)
    rewritten = rewritten_block(block, (height, width), scale)
    torch.testing.assert_close(rewritten(x), plainly(block, x, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hw", [(5, 6), (3, 9), (1, 4), (14, 14), (21, 16), (22, 26)])
def test_borders_and_corners_equal_the_published_ones(hw: tuple[int, int]) -> None:
    """Both the convolution's zero padding and the interpolation's clamping act there."""
    block = randomized(convolution_block(4, 6, 3), seed=1)
    x = random_map(2, 4, *hw) + 1.0  # away from zero, so that padding differs from repeating
    actual, expected = rewritten_block(block, hw)(x), plainly(block, x)
    parts = (slice(0, 1), slice(1, 4), slice(-4, -1), slice(-1, None), slice(None))
    for rows in parts:
        for columns in parts:
            assert relative_error(actual[..., rows, columns], expected[..., rows, columns]) <= 1e-12


def test_the_impulse_response_equals_the_published_one_at_every_pixel() -> None:
    block = randomized(convolution_block(1, 2, 3))
    rewritten = rewritten_block(block, (3, 4))
    for place in range(12):
        x = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
        x.view(-1)[place] = 1
        torch.testing.assert_close(rewritten(x), plainly(block, x), rtol=1e-12, atol=1e-13)


def test_a_convolution_with_its_own_bias_is_rewritten_too() -> None:
    block = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    block = randomized(block)
    x = random_map(2, 3, 4, 5)
    assert relative_error(rewritten_block(block, (4, 5))(x), plainly(block, x)) <= 1e-12


def test_float32_weights_stay_float32_and_agree_to_its_precision() -> None:
    exact = randomized(convolution_block(64, 8, 3))
    module = MixBeforeInterpolation((5, 4))(copy.deepcopy(exact).float())
    rewritten = rewritten_block(copy.deepcopy(exact).float(), (5, 4))
    assert {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    x = random_map(2, 64, 5, 4)
    assert relative_error(rewritten(x.float()), plainly(exact, x)) <= 1e-6


def test_the_original_block_is_unchanged() -> None:
    block = randomized(convolution_block(3, 5, 3)).requires_grad_(True)
    before = copy.deepcopy(block.state_dict())
    rewritten = MixBeforeInterpolation((4, 5))(block)
    assert all(torch.equal(tensor, block.state_dict()[name]) for name, tensor in before.items())
    assert not any(tensor.requires_grad for tensor in (*rewritten.parameters(), *rewritten.buffers()))


@pytest.mark.parametrize(
    ("size", "block", "window"),
    [(1, 1, 1), (6, 6, 6), (7, 7, 7), (14, 7, 8), (26, 13, 14), (56, 7, 9), (104, 8, 10), (13, 13, 13)],
)
def test_bands_hold_every_weight_of_the_dense_matrices_in_short_windows(size: int, block: int, window: int) -> None:
    bands, dense = Bands(size, 4), shifted_matrices(size, 4)  # dense: (3, 4 n, n)
    assert bands.places.shape == (size // block, window)
    assert bands.weights.shape == (size // block, 4 * block, 3, window)
    rebuilt = torch.zeros_like(dense)
    for number, places in enumerate(bands.places.tolist()):
        rebuilt[:, 4 * block * number : 4 * block * (number + 1), places] = bands.weights[number].transpose(0, 1)
    assert torch.equal(rebuilt, dense)


def block_of(convolution: nn.Module, norm: nn.Module | None = None, last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(convolution, norm or nn.BatchNorm2d(5), last or nn.ReLU()).eval()


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (convolution_block(3, 5, 3), "training mode"),
        (convolution_block(3, 5, 1).eval(), "no 3x3 convolution"),
        (block_of(nn.Conv2d(3, 5, 3)), "does not pad 1 zeros"),
        (block_of(nn.Conv2d(3, 5, 3, padding=2)), "does not pad 1 zeros"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")), "does not pad 1 zeros"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1, stride=2)), "a stride"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1, dilation=2)), "a dilation"),
        (block_of(nn.Conv2d(5, 5, 3, padding=1, groups=5)), "groups"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5, track_running_stats=False)), "no running stat"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5)), "not followed by a batch norm"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1), last=nn.GELU()), "not a convolution, batch norm and ReLU"),
        (block_of(nn.Conv2d(3, 5, 3, padding=1))[:2], "not a convolution, batch norm and ReLU"),
        (nn.Sequential().eval(), "not a convolution, batch norm and ReLU"),
    ],
)
def test_an_unsupported_block_is_refused_with_the_reason(block: nn.Sequential, reason: str) -> None:
    with pytest.raises(RewriteRefused, match=f"MixBeforeInterpolation cannot rewrite Sequential: .*{reason}"):
        MixBeforeInterpolation((4, 4))(block)
