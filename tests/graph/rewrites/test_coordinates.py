"""Coordinate channels as a constant map against the original block, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.coordinates import FixCoordinates
from cclip_deploy.model.neck import CoordinateBlock
from tests.numerics import random_map, randomized, relative_error

SIDES = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_fixed_coordinates_equal_the_original_block(height: int, width: int, batch: int, seed: int) -> None:
    block = randomized(CoordinateBlock(3), seed)
    x = random_map(batch, 3, height, width, seed=seed)
    assert relative_error(FixCoordinates((height, width))(block)(x), block(x)) <= 1e-12


def test_the_border_equals_the_block_s() -> None:
    block = randomized(CoordinateBlock(3))
    x = random_map(2, 3, 6, 7)
    actual, expected = FixCoordinates((6, 7))(block)(x), block(x)
    for edge in (slice(0, 1), slice(-1, None)):
        assert relative_error(actual[:, :, edge], expected[:, :, edge]) <= 1e-12
        assert relative_error(actual[..., edge], expected[..., edge]) <= 1e-12


def test_an_input_of_zeros_gives_the_constant_map() -> None:
    block = randomized(CoordinateBlock(3))
    fixed = FixCoordinates((4, 5))(block)
    empty = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(fixed(empty)[0], fixed(empty)[1])
    place = fixed.state_dict()["place"]
    assert relative_error(fixed(empty), place.clamp(min=0).expand(2, -1, -1, -1)) <= 1e-12
    assert {name: tensor.shape for name, tensor in fixed.named_parameters()} == {"weight": (3, 3, 3, 3)}


def test_the_original_block_is_unchanged() -> None:
    block = randomized(CoordinateBlock(3))
    before = copy.deepcopy(block.state_dict())
    FixCoordinates((4, 5))(block)
    assert all(torch.equal(tensor, block.state_dict()[name]) for name, tensor in before.items())


def changed(index: int, part: nn.Module) -> CoordinateBlock:
    block = CoordinateBlock(3).eval()
    block.block[index] = part.eval()
    return block


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (CoordinateBlock(3), "training mode"),
        (changed(1, nn.BatchNorm2d(3, track_running_stats=False)), "no running statistics"),
        (changed(1, nn.Identity()), "not followed by a batch norm"),
        (changed(0, nn.Conv2d(5, 3, 3)), "does not pad 1 zeros"),
        (changed(0, nn.Conv2d(5, 3, 3, padding=1, stride=2)), "has a stride"),
        (changed(0, nn.Conv2d(5, 3, 1)), "no 3x3 convolution"),
    ],
)
def test_an_unsupported_block_is_refused_with_the_reason(block: CoordinateBlock, reason: str) -> None:
    with pytest.raises(RewriteRefused, match=f"FixCoordinates cannot rewrite CoordinateBlock: .*{reason}"):
        FixCoordinates((4, 4))(block)
