"""CARAFE as a product against the original, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.carafe import CarafeAsProduct
from cclip_deploy.model.neck import Carafe
from tests.numerics import random_map, randomized, relative_error

SIDES = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_product_equals_carafe(height: int, width: int, batch: int, seed: int) -> None:
    carafe = randomized(Carafe(5, 4), seed)
    x = random_map(batch, 5, height, width, seed=seed)
    assert relative_error(CarafeAsProduct()(carafe)(x), carafe(x)) <= 1e-12


def test_borders_and_corners_equal_carafe_s() -> None:
    carafe = randomized(Carafe(5, 4))
    x = random_map(2, 5, 5, 6)
    actual, expected = CarafeAsProduct()(carafe)(x), carafe(x)
    for rows in (slice(0, 2), slice(-2, None), slice(None)):
        for columns in (slice(0, 2), slice(-2, None), slice(None)):
            assert relative_error(actual[..., rows, columns], expected[..., rows, columns]) <= 1e-12


def test_a_last_convolution_without_bias_is_rewritten() -> None:
    carafe = Carafe(5, 4)
    carafe.out = nn.Conv2d(5, 5, 1, bias=False)
    carafe = randomized(carafe)
    x = random_map(2, 5, 3, 4)
    assert relative_error(CarafeAsProduct()(carafe)(x), carafe(x)) <= 1e-12


def test_the_original_carafe_is_unchanged_and_shares_its_weights() -> None:
    carafe = randomized(Carafe(5, 4))
    before = copy.deepcopy(carafe.state_dict())
    product = CarafeAsProduct()(carafe)
    assert all(torch.equal(tensor, carafe.state_dict()[name]) for name, tensor in before.items())
    original = {tensor.data_ptr() for tensor in carafe.state_dict().values()}
    assert (
        carafe.encode.weight.data_ptr() in {tensor.data_ptr() for tensor in product.state_dict().values()} <= original
    )


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (nn.Conv2d(5, 5, 3, padding=1), "no 1x1 convolution"),
        (nn.Conv2d(5, 5, 1, groups=5), "groups"),
        (nn.Conv2d(5, 5, 1, padding=1), "does not pad 0 zeros"),
        (nn.Conv2d(5, 5, 1, stride=2), "stride"),
    ],
)
def test_an_unsupported_carafe_is_refused_with_the_reason(out: nn.Conv2d, reason: str) -> None:
    carafe = Carafe(5, 4).eval()
    carafe.out = out
    with pytest.raises(RewriteRefused, match=f"CarafeAsProduct cannot rewrite Carafe: .*{reason}"):
        CarafeAsProduct()(carafe)
