"""Whole network: shapes, dependencies between inputs and outputs, and cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cclip_deploy.errors import UsageError
from cclip_deploy.model.config import RN101, TINY
from cclip_deploy.model.network import CausalCLIPSeg
from tests.numerics import random_map, randomized, relative_error


@pytest.fixture(scope="module")
def network() -> CausalCLIPSeg:
    return randomized(CausalCLIPSeg(TINY), seed=4)


def prompts(*rows: tuple[int, ...], length: int = 9) -> Tensor:
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, words in zip(tokens, rows, strict=True):
        row[: len(words) + 2] = torch.tensor([49406, *words, 49407])
    return tokens


@pytest.mark.parametrize("hw", [(32, 32), (64, 96), (128, 32)])
def test_logits_of_both_branches_have_the_image_s_size(network: CausalCLIPSeg, hw: tuple[int, int]) -> None:
    logits = network(random_map(2, 3, *hw), prompts((320,), (7, 8)))
    assert logits.causal.shape == logits.confounding.shape == (2, 1, *hw)
    assert relative_error(logits.causal, logits.confounding) > 0.1


def test_each_row_of_a_batch_is_computed_as_if_alone(network: CausalCLIPSeg) -> None:
    image, tokens = random_map(3, 3, 32, 64), prompts((320, 9), (7, 8, 1200), (41,))
    together = network(image, tokens)
    for row in range(3):
        alone = network(image[row : row + 1], tokens[row : row + 1])
        assert relative_error(together.causal[row], alone.causal[0]) <= 1e-12
        assert relative_error(together.confounding[row], alone.confounding[0]) <= 1e-12


def test_both_image_and_prompt_change_the_logits(network: CausalCLIPSeg) -> None:
    image, tokens = random_map(1, 3, 32, 64), prompts((320, 9))
    answer = network(image, tokens).causal
    assert relative_error(network(image, prompts((320, 10))).causal, answer) > 1e-2
    assert relative_error(network(random_map(1, 3, 32, 64, seed=1), tokens).causal, answer) > 1e-2


def test_each_head_reads_the_features_of_its_own_branch(network: CausalCLIPSeg) -> None:
    image, tokens = random_map(1, 3, 32, 64), prompts((320, 9))
    logits, state = network(image, tokens), network.text_tower(tokens)
    features = network.neck(network.image_tower(image))
    assert torch.equal(logits.causal, network.head(features.causal, state))
    assert torch.equal(logits.confounding, network.confounding_head(features.confounding, state))


def test_causal_logits_alone_are_the_first_of_both(network: CausalCLIPSeg) -> None:
    image, tokens = random_map(2, 3, 32, 64), prompts((320, 9), (7, 8, 1200))
    assert torch.equal(network.causal_logits(image, tokens), network(image, tokens).causal)


def test_image_that_is_not_a_multiple_of_32_is_refused(network: CausalCLIPSeg) -> None:
    with pytest.raises(UsageError, match="Image size 64x40"):
        network(random_map(1, 3, 64, 40), prompts((320,)))


def test_every_parameter_learns_from_one_of_the_two_branches() -> None:
    network = randomized(CausalCLIPSeg(TINY)).requires_grad_(True)
    logits = network(random_map(1, 3, 32, 64), prompts((7, 8, 1200)))
    (logits.causal.square().mean() + logits.confounding.square().mean()).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # A softmax does not see what all keys share.
    assert set(silent) <= {"image_tower.attnpool.k_proj.bias"}


def test_causal_logits_teach_all_but_the_confounding_head() -> None:
    network = randomized(CausalCLIPSeg(TINY)).requires_grad_(True)
    causal = network(random_map(1, 3, 32, 32), prompts((320,))).causal.sum()
    other = [*network.confounding_head.parameters()]
    own = [*network.head.parameters(), network.image_tower.conv1.weight, network.text_tower.text_projection]
    assert all(gradient.any() for gradient in torch.autograd.grad(causal, own, retain_graph=True))
    assert not any(gradient is not None for gradient in torch.autograd.grad(causal, other, allow_unused=True))


def test_rn101_costs_what_the_published_network_costs() -> None:
    """Spec: 315.5 GFLOPs at 224x224 for 17 tokens, by part, measured with PyTorch's counter on the published code."""
    with torch.device("meta"):
        network = CausalCLIPSeg(RN101).eval().requires_grad_(False)
        image, tokens = torch.empty(1, 3, 224, 224), torch.zeros(1, 17, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(image, tokens)
    by_module = {name: sum(counts.values()) / 1e9 for name, counts in counter.get_flop_counts().items()}
    parts = ("image_tower", "text_tower", "neck", "head", "confounding_head")
    measured = {part: round(by_module[f"CausalCLIPSeg.{part}"], 1) for part in parts}
    assert measured == {"image_tower": 19.6, "text_tower": 1.3, "neck": 14.6, "head": 140.0, "confounding_head": 140.0}
    assert round(counter.get_total_flops() / 1e9, 1) == 315.5


def test_batch_norms_keep_pytorch_s_epsilon(network: CausalCLIPSeg) -> None:
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-5}
