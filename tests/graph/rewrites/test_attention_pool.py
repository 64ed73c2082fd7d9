"""The rewritten attention pool against the original, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cclip_deploy.errors import RewriteRefused
from cclip_deploy.graph.rewrites.attention_pool import FixAttentionPool
from cclip_deploy.model.towers import DenseAttentionPool
from tests.numerics import random_map, randomized, relative_error

SIDES = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_fixed_pool_equals_the_plain_one(height: int, width: int, batch: int, heads: int, seed: int) -> None:
    pool = randomized(DenseAttentionPool(grid=5, width=16, heads=heads, out_width=6), seed)
    x = random_map(batch, 16, height, width, seed=seed)
    assert relative_error(FixAttentionPool((height, width))(pool)(x), pool(x)) <= 1e-12


def test_float32_weights_are_computed_in_float64_and_stay_float32() -> None:
    exact = randomized(DenseAttentionPool(grid=7, width=64, heads=4, out_width=16))
    fixed = FixAttentionPool((3, 5))(copy.deepcopy(exact).float())
    assert {tensor.dtype for tensor in fixed.state_dict().values()} == {torch.float32}
    x = random_map(2, 64, 3, 5)
    assert relative_error(fixed(x.float()), exact(x)) <= 1e-6


def test_the_original_pool_is_unchanged_and_shares_its_last_projection() -> None:
    pool = randomized(DenseAttentionPool(grid=5, width=16, heads=4, out_width=6))
    before = copy.deepcopy(pool.state_dict())
    fixed = FixAttentionPool((2, 3))(pool)
    assert all(torch.equal(tensor, pool.state_dict()[name]) for name, tensor in before.items())
    assert fixed.out_weight.data_ptr() == pool.c_proj.weight.data_ptr()


def changed(index: int, part: nn.Module) -> DenseAttentionPool:
    pool = DenseAttentionPool(grid=5, width=16, heads=4, out_width=6).eval()
    pool.connect[index] = part.eval()
    return pool


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (DenseAttentionPool(grid=5, width=16, heads=4, out_width=6), "training mode"),
        (changed(1, nn.BatchNorm2d(6, track_running_stats=False)), "no running statistics"),
        (changed(0, nn.Conv2d(16, 6, 3, padding=1)), "no 1x1 convolution"),
    ],
)
def test_an_unsupported_pool_is_refused_with_the_reason(pool: DenseAttentionPool, reason: str) -> None:
    with pytest.raises(RewriteRefused, match=f"FixAttentionPool cannot rewrite DenseAttentionPool: .*{reason}"):
        FixAttentionPool((2, 2))(pool)
