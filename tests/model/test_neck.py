"""Causal neck, compared with loops over pixels and plain convolutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cclip_deploy.model.config import TINY
from cclip_deploy.model.neck import Carafe, CausalNeck, CoordinateBlock, Masker, coordinate_channels
from cclip_deploy.model.towers import ImagePyramid
from tests.model.oracles import block, carafe_by_pixels, convolve, normed, with_coordinates
from tests.numerics import random_map, randomized, relative_error

SIDES = st.integers(1, 7)
CARAFE = randomized(Carafe(5, 4), seed=1)
MASKER = randomized(Masker(4), seed=2)


@pytest.fixture(scope="module")
def neck() -> CausalNeck:
    return randomized(CausalNeck(TINY), seed=3)


@pytest.fixture(scope="module")
def pyramid() -> ImagePyramid:
    return ImagePyramid(random_map(2, 64, 8, 12), random_map(2, 128, 4, 6), random_map(2, 64, 2, 3))


@settings(max_examples=20, deadline=None)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 3))
def test_carafe_weighs_nine_input_pixels_for_every_output_pixel(height: int, width: int, batch: int) -> None:
    x = random_map(batch, 5, height, width)
    assert relative_error(CARAFE(x), carafe_by_pixels(CARAFE, x)) <= 1e-12


def test_carafe_with_even_weights_is_a_3x3_mean_repeated() -> None:
    module = randomized(Carafe(5, 4))
    module.encode.weight.zero_()
    module.encode.bias.zero_()  # type: ignore[union-attr]
    module.out.weight.copy_(torch.eye(5)[:, :, None, None])
    module.out.bias.zero_()  # type: ignore[union-attr]
    x = random_map(1, 5, 3, 4)
    expected = functional.avg_pool2d(x, 3, stride=1, padding=1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert relative_error(module(x), expected) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(height=SIDES, width=SIDES)
def test_coordinates_are_x_then_y_from_minus_one_to_one(height: int, width: int) -> None:
    expected = with_coordinates(torch.zeros(1, 0, height, width, dtype=torch.float64))
    actual = coordinate_channels((height, width), random_map(1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


def test_coordinates_stand_after_the_input_s_channels() -> None:
    module, x = randomized(CoordinateBlock(4)), random_map(2, 4, 3, 5)
    assert relative_error(module(x), block(with_coordinates(x), module.block)) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 3))
def test_masker_is_its_four_convolutions_a_norm_and_a_sigmoid(height: int, width: int, batch: int) -> None:
    x = random_map(batch, 4, height, width)
    hidden = block(with_coordinates(x), MASKER.locate.block)
    hidden = block(with_coordinates(block(hidden, MASKER.mix)), MASKER.relocate.block)
    score = convolve(hidden, MASKER.score.weight) + MASKER.score.bias[:, None, None]  # type: ignore[index]
    expected = 1 / (1 + torch.exp(-normed(score, MASKER.norm)))
    assert relative_error(MASKER(x), expected) <= 1e-12


def test_levels_come_to_a_sixteenth_of_the_image(neck: CausalNeck, pyramid: ImagePyramid) -> None:
    q3, q4, q5 = neck.levels(pyramid)
    corners = [pyramid.v3[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]
    assert relative_error(q3, torch.stack(corners).mean(0)) <= 1e-12
    assert relative_error(q4, block(block(pyramid.v4, neck.project4), neck.refine4)) <= 1e-12
    assert relative_error(q5, carafe_by_pixels(neck.carafe, pyramid.v5)) <= 1e-12


def test_masks_split_each_level_and_one_block_mixes_both_branches(neck: CausalNeck, pyramid: ImagePyramid) -> None:
    levels = neck.levels(pyramid)
    maskers = (neck.masker3, neck.masker4, neck.masker5)
    masks = [masker(level) for masker, level in zip(maskers, levels, strict=True)]
    causal, confounding = (
        block(torch.cat([q * share for q, share in zip(levels, shares, strict=True)], dim=1), neck.aggregate)
        for shares in (masks, [1 - mask for mask in masks])
    )
    out = neck(pyramid)
    assert relative_error(out.causal, causal) <= 1e-12
    assert relative_error(out.confounding, confounding) <= 1e-12
    for actual, expected in zip(out.masks, masks, strict=True):
        assert torch.equal(actual, expected)
        assert bool(((actual > 0) & (actual < 1)).all())
        assert actual.std() > 0.05  # a mask that is the same everywhere would prove nothing


def test_causal_branch_alone_is_the_causal_half_of_both(neck: CausalNeck, pyramid: ImagePyramid) -> None:
    assert torch.equal(neck.causal_features(pyramid), neck(pyramid).causal)
