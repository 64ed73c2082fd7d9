"""Tests of mask statistics and the toggle effect with known masks and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cclip_deploy.datasets.synthetic.generator import image_rng, make_samples
from cclip_deploy.errors import UsageError
from cclip_deploy.evaluation.causal import (
    ToggledImage,
    measure_causal_masks,
    measure_toggle_effect,
    untrained_mask_statistics,
)
from cclip_deploy.imaging.preprocess import Preprocessing, to_input
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.prompts.tokenizer import PromptTokenizer


def network_with_masks(*masks: torch.Tensor) -> Any:
    neck = SimpleNamespace(levels=lambda pyramid: pyramid, masks=lambda levels: masks)
    return SimpleNamespace(neck=neck, image_tower=lambda image: (image,) * 3)


def test_mask_statistics_match_closed_forms() -> None:
    halves, ones = torch.full((1, 4, 2, 2), 0.5), torch.ones(1, 4, 2, 2)
    hard = torch.cat([torch.zeros(1, 1, 2, 2), torch.ones(1, 3, 2, 2)], dim=1)
    facts = measure_causal_masks(network_with_masks(ones, halves, hard), [np.zeros((32, 32), np.float32)] * 2, (32, 32))
    assert facts.mean == (1.0, 0.5, 0.75)
    assert facts.entropy_bits == (0.0, 1.0, 0.0)
    assert facts.sd == (0.0, 0.0, pytest.approx((0.75 * 0.25) ** 0.5))


def test_mask_statistics_are_those_of_the_maskers_outputs() -> None:
    torch.manual_seed(0)
    model = CausalCLIPSeg(TINY).eval()
    film = np.random.default_rng(0).random((64, 64), np.float32)
    seen: list[torch.Tensor] = []
    handle = model.neck.masker4.register_forward_hook(lambda module, inputs, output: seen.append(output.double()))
    facts = measure_causal_masks(model, [film], (64, 64))
    handle.remove()
    p = seen[0].detach()
    assert facts.mean[1] == pytest.approx(float(p.mean()))
    entropy = torch.distributions.Bernoulli(probs=p).entropy().mean() / np.log(2)
    assert facts.entropy_bits[1] == pytest.approx(float(entropy))
    assert facts.sd[1] == pytest.approx(float(p.std(correction=0)), rel=1e-6)


def test_untrained_masks_have_the_statistics_of_a_sigmoid_of_normals() -> None:
    torch.manual_seed(0)
    model = CausalCLIPSeg(TINY).train()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics of the one batch
    films = [make_samples(image_rng(0, "test", number), (64, 64), 1)[0].image for number in range(120)]
    batch = torch.cat([torch.from_numpy(to_input(film, (64, 64), Preprocessing())) for film in films[:80]])
    with torch.no_grad():
        model.neck.masks(model.neck.levels(model.image_tower(batch)))
    facts = measure_causal_masks(model.eval(), films[80:], (64, 64))
    mean, entropy_bits, sd = untrained_mask_statistics()
    normal = torch.sigmoid(torch.randn(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert (mean, sd) == pytest.approx((float(normal.mean()), float(normal.std())), abs=1e-3)
    assert entropy_bits == pytest.approx(
        float(torch.distributions.Bernoulli(normal).entropy().mean() / np.log(2)), abs=1e-3
    )
    assert facts.mean == pytest.approx([mean] * 3, abs=0.02)
    assert facts.entropy_bits == pytest.approx([entropy_bits] * 3, abs=0.02)
    assert facts.sd == pytest.approx([sd] * 3, abs=0.02)


def test_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match="no images"):
        measure_causal_masks(network_with_masks(*[torch.ones(1, 1, 1, 1)] * 3), [], (32, 32))
    with pytest.raises(UsageError, match="no images"):
        measure_toggle_effect(Answering(PromptTokenizer.from_open_clip()), [])


class Answering:
    """Network that predicts the image itself, divided by the number of the prompt."""

    prompt_length, threshold = 32, 0.5

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer

    def answer(self, pixels: Any, rows: Sequence[Any]) -> Iterator[Any]:
        for number in range(len(rows)):
            yield pixels / (1 + number)

    def describe(self) -> dict[str, Any]:
        return {}


def test_the_toggle_effect_is_the_mean_change_inside_the_lungs(tokenizer: PromptTokenizer) -> None:
    one, other = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    lungs = np.zeros((4, 4), np.bool_)
    lungs[1:3, 1:3] = True
    other[1, 1], other[0, 0] = -0.8, 1.0  # inside, of four pixels; outside
    film = ToggledImage(one, other, lungs, ("left lung", "right lung"))
    assert measure_toggle_effect(Answering(tokenizer), [film]) == pytest.approx((0.2 + 0.1) / 2)
