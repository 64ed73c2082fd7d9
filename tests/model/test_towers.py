"""Both towers, compared with open_clip, PyTorch's attention and closed forms in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cclip_deploy.errors import PromptError, UsageError
from cclip_deploy.model.config import TINY
from cclip_deploy.model.towers import DenseAttentionPool, ImageTower, TextTower
from tests.model.open_clip_twin import open_clip_twin
from tests.numerics import random_map, randomized, relative_error

START, END = 49406, 49407
POOL = randomized(DenseAttentionPool(grid=7, width=16, heads=4, out_width=6), seed=3)


@pytest.fixture(scope="module")
def text_tower() -> TextTower:
    return randomized(TextTower(TINY), seed=1)


@pytest.fixture(scope="module")
def image_tower() -> ImageTower:
    return randomized(ImageTower(TINY), seed=2)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    """Prompts of different lengths, zeros after the end token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, 49000, (rows, length), generator=generator)
    for row, end in zip(tokens, torch.linspace(1, length - 1, rows).long(), strict=True):
        row[0], row[end], row[end + 1 :] = START, END, 0
    return tokens


def cubic_matrix(size: int, target: int) -> Tensor:
    """(target, size): Keys' kernel with a = -0.75 at half-pixel centers, the border repeated."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        place = (row + 0.5) * size / target - 0.5
        first = int(torch.tensor(place).floor())
        for index in range(first - 1, first + 3):
            x = abs(place - index)
            inner, outer = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(index, 0), size - 1)] += inner if x <= 1 else outer if x < 2 else 0
    return matrix


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 16), width=st.integers(1, 16))
def test_embedding_is_resized_bicubically_without_its_class_row(height: int, width: int) -> None:
    square = POOL.positional_embedding[1:].reshape(7, 7, -1)  # row-major (y, x)
    expected = torch.einsum("yi,xj,ijc->cyx", cubic_matrix(7, height), cubic_matrix(7, width), square)
    assert relative_error(POOL.embedding((height, width))[0], expected) <= 1e-12


def test_embedding_at_its_own_grid_is_untouched() -> None:
    assert torch.equal(POOL.embedding((7, 7))[0, :, 2, 5], POOL.positional_embedding[1 + 2 * 7 + 5])


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 3))
def test_attention_pool_is_pytorch_s_attention_with_every_position_a_query(height: int, width: int, batch: int) -> None:
    x = random_map(batch, 16, height, width)
    z = (x + POOL.embedding((height, width))).flatten(2).permute(2, 0, 1)  # (hw, B, 16)
    attended, _ = functional.multi_head_attention_forward(
        z, z, z, 16, POOL.heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([POOL.q_proj.bias, POOL.k_proj.bias, POOL.v_proj.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
        out_proj_weight=POOL.c_proj.weight, out_proj_bias=POOL.c_proj.bias,
        training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=POOL.q_proj.weight, k_proj_weight=POOL.k_proj.weight, v_proj_weight=POOL.v_proj.weight,
    )  # fmt: skip
    residual = POOL.connect(x)  # starts from x, not from z
    expected = torch.relu(attended.permute(1, 2, 0).reshape(batch, 6, height, width) + residual)
    assert relative_error(POOL(x), expected) <= 1e-12


def test_attention_pool_without_attention_leaves_a_normed_1x1_convolution_of_its_input() -> None:
    pool = randomized(DenseAttentionPool(grid=7, width=16, heads=4, out_width=6), seed=3)
    pool.c_proj.weight.zero_()
    pool.c_proj.bias.zero_()
    x, values = random_map(2, 16, 3, 5), pool.connect.state_dict()
    mixed = torch.einsum("oi,bihw->bohw", values["0.weight"].flatten(1), x)
    scale = values["1.weight"] / (values["1.running_var"] + 1e-5).sqrt()
    expected = (mixed - values["1.running_mean"][:, None, None]) * scale[:, None, None]
    expected = expected + values["1.bias"][:, None, None]
    assert relative_error(pool(x), expected.clamp(min=0)) <= 1e-12


@pytest.mark.parametrize("hw", [(32, 32), (64, 96), (160, 32)])
def test_three_maps_leave_the_image_tower_at_strides_8_16_and_32(image_tower: ImageTower, hw: tuple[int, int]) -> None:
    maps = image_tower(random_map(2, 3, *hw))
    expected = [(2, channels, hw[0] // stride, hw[1] // stride) for channels, stride in ((64, 8), (128, 16), (64, 32))]
    assert [tuple(value.shape) for value in maps] == expected


def test_stages_are_open_clip_s_unchanged(image_tower: ImageTower) -> None:
    visual = open_clip_twin(TINY).visual.double()
    weights = {name: value for name, value in image_tower.state_dict().items() if ".connect." not in name}
    visual.load_state_dict(weights)  # strict: every tensor but the residual's is open_clip's
    stages: dict[str, Tensor] = {}
    for name in ("layer2", "layer3", "layer4"):
        visual.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: stages.update({name: out}))
    image = random_map(2, 3, 224, 224)
    visual(image)
    pyramid = image_tower(image)
    assert relative_error(pyramid.v3, stages["layer2"]) <= 1e-12
    assert relative_error(pyramid.v4, stages["layer3"]) <= 1e-12
    assert relative_error(pyramid.v5, image_tower.attnpool(stages["layer4"])) <= 1e-12


def test_image_that_is_not_a_multiple_of_32_is_refused(image_tower: ImageTower) -> None:
    with pytest.raises(UsageError, match="48 is not a positive multiple of 32"):
        image_tower(random_map(1, 3, 64, 48))


@pytest.mark.parametrize("length", [3, 17, 32, 77])
def test_text_state_is_open_clip_s_of_the_prompt_padded_to_77(text_tower: TextTower, length: int) -> None:
    clip = open_clip_twin(TINY).double()
    clip.load_state_dict(text_tower.state_dict(), strict=False)
    tokens = prompts(4, length)
    expected = clip.encode_text(functional.pad(tokens, (0, 77 - length)))
    assert relative_error(text_tower(tokens), expected) <= 1e-12


def test_text_state_depends_on_every_word_before_the_end_token_and_on_nothing_after_it(text_tower: TextTower) -> None:
    tokens = torch.tensor([[START, 320, 901, 5, END, 0, 0, 0]])
    state = text_tower(tokens)
    for place in range(8):
        changed = tokens.clone()
        changed[0, place] = 7
        if place > 4:
            assert torch.equal(text_tower(changed), state)
        elif place < 4:
            assert relative_error(text_tower(changed), state) > 1e-3


def test_text_state_is_the_same_in_any_prompt_length_and_integer_type(text_tower: TextTower) -> None:
    tokens = prompts(3, 12)
    expected = text_tower(tokens)
    for length in (13, 40, 77):
        assert relative_error(text_tower(functional.pad(tokens, (0, length - 12))), expected) <= 1e-12
    assert torch.equal(text_tower(tokens.int()), expected)


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(text_tower: TextTower) -> None:
    with pytest.raises(PromptError, match="78 tokens exceed the text tower's limit of 77"):
        text_tower(torch.ones(1, 78, dtype=torch.int64))
