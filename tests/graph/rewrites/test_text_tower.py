"""The text tower as plain products for one prompt length, against the original, in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cclip_deploy.errors import PromptError, RewriteRefused
from cclip_deploy.graph.rewrites.text_tower import FixPromptLength
from cclip_deploy.model.config import TINY
from cclip_deploy.model.towers import TextTower
from tests.numerics import randomized, relative_error

END = 299
TOWER = randomized(TextTower(dataclasses.replace(TINY, vocabulary_size=300)), seed=2)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random tokens with each row's end token after its first token, and smaller tokens after it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, END, (rows, length), generator=generator)
    tokens[torch.arange(rows), torch.randint(1, length, (rows,), generator=generator)] = END
    return tokens


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 77), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_tower_of_one_length_equals_the_tower(length: int, rows: int, seed: int) -> None:
    tokens = prompts(rows, length, seed)
    assert relative_error(FixPromptLength(length)(TOWER)(tokens), TOWER(tokens)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integer_types_are_read(dtype: torch.dtype) -> None:
    tokens = prompts(3, 12)
    assert torch.equal(FixPromptLength(12)(TOWER)(tokens.to(dtype)), FixPromptLength(12)(TOWER)(tokens))


def test_tokens_after_the_end_token_have_no_influence() -> None:
    """Although the mask is finite, their weight must be exactly zero."""
    tower, tokens = FixPromptLength(12)(TOWER), prompts(1, 12)
    tokens[0] = torch.tensor([7, 8, END, *range(9)])
    changed = tokens.clone()
    changed[0, 3:] = torch.arange(200, 209)
    assert torch.equal(tower(changed), tower(tokens))


def test_every_number_in_the_mask_fits_half_precision() -> None:
    named = FixPromptLength(12)(TOWER).named_buffers()
    [mask] = [tensor for name, tensor in named if name.endswith("mask")]  # one for all layers
    assert bool(mask.half().isfinite().all())
    assert int((mask.triu(1) < -1e4).sum()) == 12 * 11 // 2
    assert not bool(mask.tril().any())


def test_float32_weights_stay_float32_and_agree_to_its_precision() -> None:
    tower = FixPromptLength(12)(copy.deepcopy(TOWER).float())
    assert {tensor.dtype for tensor in tower.state_dict().values()} == {torch.float32}
    tokens = prompts(4, 12)
    assert relative_error(tower(tokens), TOWER(tokens)) <= 1e-5


def test_the_original_tower_is_unchanged_and_shares_its_token_table() -> None:
    before = copy.deepcopy(TOWER.state_dict())
    tower = FixPromptLength(12)(TOWER)
    assert all(torch.equal(tensor, TOWER.state_dict()[name]) for name, tensor in before.items())
    assert TOWER.token_embedding.weight.data_ptr() in {tensor.data_ptr() for tensor in tower.parameters()}


def test_lengths_that_are_too_long_or_too_short_are_refused() -> None:
    with pytest.raises(RewriteRefused, match=r"FixPromptLength cannot rewrite TextTower: 78 tokens .* tower's 77"):
        FixPromptLength(78)(TOWER)
    with pytest.raises(PromptError, match="must be at least 2"):
        FixPromptLength(1)
