"""The deploy form against the network it was made of, in float64, and against the published network's own numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cclip_deploy.errors import RewriteRefused, UsageError
from cclip_deploy.graph.deploy import DeployForm, MaskDecoder, RowDecoder, sum_shifted, to_deploy_form
from cclip_deploy.model.checkpoint import load_checkpoint
from cclip_deploy.model.config import TINY
from cclip_deploy.model.neck import Carafe, CoordinateBlock
from cclip_deploy.model.network import CausalCLIPSeg
from tests.numerics import random_map, randomized, relative_error
from tests.published.checkpoint import example, golden

HW = (64, 96)
LENGTH = 12


@pytest.fixture(scope="module")
def network() -> CausalCLIPSeg:
    return randomized(CausalCLIPSeg(TINY), seed=6)


@pytest.fixture(scope="module")
def form(network: CausalCLIPSeg) -> DeployForm:
    return to_deploy_form(network, HW, LENGTH, with_masks=True, with_confounding=True)


def prompts(rows: int, length: int = LENGTH) -> Tensor:
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    for number, row in enumerate(tokens):
        end = 1 + (3 * number + 1) % (length - 1)
        row[0], row[1:end], row[end] = 49406, torch.arange(300 + number, 299 + number + end), 49407
    return tokens


@pytest.mark.parametrize(
    ("hw", "length", "batch"), [((32, 32), 3, 1), ((32, 160), 5, 2), ((96, 64), 77, 1), ((224, 224), 32, 1)]
)
def test_fused_path_equals_the_published_order(
    network: CausalCLIPSeg, hw: tuple[int, int], length: int, batch: int
) -> None:
    image, tokens = random_map(batch, 3, *hw), prompts(batch, length)
    form = to_deploy_form(network, hw, length)
    assert relative_error(form.fused(image, tokens), network.causal_logits(image, tokens)) <= 1e-12


def test_every_prompt_is_decoded_on_every_image(network: CausalCLIPSeg, form: DeployForm) -> None:
    image, tokens = random_map(2, 3, *HW), prompts(3)
    logits = form(image, tokens)
    assert logits.shape == (2, 3, *HW)
    for number in range(2):
        for prompt in range(3):
            alone = network.causal_logits(image[number : number + 1], tokens[prompt : prompt + 1])
            assert relative_error(logits[number, prompt], alone[0, 0]) <= 1e-12


def test_masks_and_confounding_features_equal_the_network_s(network: CausalCLIPSeg, form: DeployForm) -> None:
    image = random_map(2, 3, *HW)
    neck = network.neck(network.image_tower(image))
    features, *masks, confounding = form.image_encoder(image)
    assert relative_error(features.permute(0, 3, 1, 2), network.head.upsample(neck.causal)) <= 1e-12
    for actual, expected in zip(masks, neck.masks, strict=True):
        assert relative_error(actual, expected) <= 1e-12
    assert relative_error(confounding, neck.confounding) <= 1e-12


@pytest.mark.parametrize(("masks", "confounding", "count"), [(False, False, 1), (True, False, 4), (False, True, 2)])
def test_further_outputs_come_on_request_only(
    network: CausalCLIPSeg, masks: bool, confounding: bool, count: int
) -> None:
    form = to_deploy_form(network, (32, 32), LENGTH, masks, confounding)
    assert len(form.image_encoder(random_map(1, 3, 32, 32))) == count


def test_row_decoder_is_the_diagonal_of_the_mask_decoder() -> None:
    kernel, tap_bias, bias = random_map(3, 9, 5), random_map(3, 9, seed=1), random_map(3, seed=2)
    features = random_map(3, 4, 6, 5)
    pairs = MaskDecoder()(features, kernel, tap_bias, bias)
    assert pairs.shape == (3, 3, 4, 6)
    rows = RowDecoder()(features, kernel, tap_bias, bias)
    assert relative_error(rows[:, 0], pairs.diagonal().permute(2, 0, 1)) <= 1e-12


@pytest.mark.parametrize("hw", [(1, 1), (1, 4), (3, 1), (4, 5)])
def test_decoder_equals_a_convolution_whose_tap_biases_stop_at_the_border(hw: tuple[int, int]) -> None:
    kernel, tap_bias, bias = random_map(2, 9, 5), random_map(2, 9, seed=1), random_map(2, seed=2)
    features = random_map(3, *hw, 5)
    first = features.permute(0, 3, 1, 2)
    inside = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
    weight = torch.cat([kernel, tap_bias[:, :, None]], dim=2).transpose(1, 2).reshape(2, 6, 3, 3)
    expected = torch.nn.functional.conv2d(inside, weight, bias, padding=1)
    assert relative_error(MaskDecoder()(features, kernel, tap_bias, bias), expected) <= 1e-12


@pytest.mark.parametrize("hw", [(1, 1), (2, 3), (5, 4)])
def test_shifted_sum_takes_each_tap_from_its_own_neighbor(hw: tuple[int, int]) -> None:
    taps = random_map(2, 9, *hw)
    expected = torch.zeros(2, *hw, dtype=torch.float64)
    for y in range(hw[0]):
        for x in range(hw[1]):
            for k_y in range(3):
                for k_x in range(3):
                    if 0 <= y + k_y - 1 < hw[0] and 0 <= x + k_x - 1 < hw[1]:
                        expected[:, y, x] += taps[:, 3 * k_y + k_x, y + k_y - 1, x + k_x - 1]
    assert relative_error(sum_shifted(taps), expected) <= 1e-12


def test_all_rewritten_modules_are_replaced(form: DeployForm) -> None:
    left = [module for module in form.modules() if isinstance(module, nn.BatchNorm2d | CoordinateBlock | Carafe)]
    assert left == []
    assert not any(module.training for module in form.modules())


def test_the_network_is_unchanged_and_still_works(network: CausalCLIPSeg) -> None:
    before, image, tokens = copy.deepcopy(network.state_dict()), random_map(1, 3, 32, 32), prompts(1)
    structure, expected = str(network), network(image, tokens)
    to_deploy_form(network, (32, 32), LENGTH)
    assert str(network) == structure
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    again = network(image, tokens)
    assert torch.equal(again.causal, expected.causal)
    assert torch.equal(again.confounding, expected.confounding)


def test_weights_that_no_rewrite_changes_are_shared(network: CausalCLIPSeg, form: DeployForm) -> None:
    original = {tensor.data_ptr() for tensor in network.state_dict().values()}
    shared = sum(t.numel() for t in form.state_dict().values() if t.data_ptr() in original)
    assert shared > network.text_tower.token_embedding.weight.numel()
    projection = form.state_dict()["image_encoder.neck.carafe.compress.weight"]
    assert projection.data_ptr() == network.neck.carafe.compress.weight.data_ptr()


def test_form_of_a_trainable_network_holds_constants() -> None:
    network = randomized(CausalCLIPSeg(TINY)).requires_grad_(True)
    form = to_deploy_form(network, (32, 32), LENGTH)
    assert not any(buffer.requires_grad for buffer in form.buffers())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_network_in_training_mode_is_refused_and_unchanged() -> None:
    network = CausalCLIPSeg(TINY).train()
    with pytest.raises(RewriteRefused, match=r"training mode.*Call eval\(\) first"):
        to_deploy_form(network, HW, LENGTH)
    assert all(module.training for module in network.modules())


def test_one_norm_in_training_mode_is_enough_to_refuse(network: CausalCLIPSeg) -> None:
    altered = copy.deepcopy(network)
    altered.image_tower.layer3[1].bn2.train()
    with pytest.raises(RewriteRefused, match="training mode"):
        to_deploy_form(altered, HW, LENGTH)


@pytest.mark.parametrize(
    ("hw", "length", "reason"),
    [
        ((64, 100), 32, "100 is not a positive multiple of 32. Use 96"),
        ((0, 64), 32, "0 is not a positive multiple"),
        (HW, 2, "A prompt length of 2 is out of range. Use 3 to 77"),
        (HW, 78, "A prompt length of 78 is out of range. Use 3 to 77"),
    ],
)
def test_invalid_sizes_are_refused(network: CausalCLIPSeg, hw: tuple[int, int], length: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        to_deploy_form(network, hw, length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "example_sizes"),
    [("224", 0, (0, 2, 224, 32)), ("256x320", 1, (1, 1, 256, 20, 320))],
)
def test_deploy_form_agrees_with_the_published_network(
    name: str,
    seed: int,
    example_sizes: tuple[int, ...],
    published_checkpoint: Callable[[int], Path],
) -> None:
    image, tokens = (torch.from_numpy(value) for value in example(*example_sizes))
    expected = golden(name)
    model = load_checkpoint(published_checkpoint(seed)).model
    form = to_deploy_form(model, (image.shape[2], image.shape[3]), tokens.shape[1], with_masks=True)
    with torch.inference_mode():
        features, *masks = form.image_encoder(image)
        logits = form.row_decoder(features, *form.prompt_encoder(tokens))
    assert relative_error(logits, torch.from_numpy(expected["causal_logits"])) <= 1e-5
    for level, mask in zip((3, 4, 5), masks, strict=True):
        assert relative_error(mask[:, ::16, ::2, ::2], torch.from_numpy(expected[f"mask{level}"])) <= 1e-5
