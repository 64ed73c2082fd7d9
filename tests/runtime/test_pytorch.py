"""The reference backend computes the plain network."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from cclip_deploy.errors import UsageError
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.runtime.pytorch import PyTorchBackend

IMAGE_HW = (32, 64)


def inputs(pictures: int, prompts: int, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    tokens = np.zeros((prompts, length), np.int64)
    tokens[:, 0] = 49406
    for row, words in zip(tokens, (7, 2, 4), strict=False):
        row[1 : words + 1], row[words + 1] = rng.integers(320, 49000, words), 49407
    return rng.standard_normal((pictures, 3, *IMAGE_HW)).astype(np.float32), tokens


def distance(value: np.ndarray, truth: np.ndarray) -> float:
    """Relative error, in float64."""
    return float(np.linalg.norm(value.astype(np.float64) - truth) / np.linalg.norm(truth.astype(np.float64)))


def test_all_pairs_is_every_prompt_on_every_picture(tiny_network: CausalCLIPSeg) -> None:
    image, tokens = inputs(2, 3)
    pairs = PyTorchBackend(tiny_network).all_pairs(image, tokens)
    assert pairs.shape == (2, 3, *IMAGE_HW)
    assert pairs.dtype == np.float32
    for b in range(2):
        for p in range(3):
            with torch.inference_mode():
                causal, _ = tiny_network(torch.from_numpy(image[b : b + 1]), torch.from_numpy(tokens[p : p + 1]))
            assert distance(pairs[b, p], causal[0, 0].numpy()) <= 1e-5


@pytest.mark.parametrize("graph", ["fused", "plain"])
def test_rows_are_the_causal_logits_of_forward(tiny_network: CausalCLIPSeg, graph: str) -> None:
    image, tokens = inputs(2, 2)
    with torch.inference_mode():
        causal, _ = tiny_network(torch.from_numpy(image), torch.from_numpy(tokens))
    logits = PyTorchBackend(tiny_network).run(graph, {"image": image, "tokens": tokens})["logits"]
    assert distance(logits, causal.numpy()) <= 1e-5


def test_mask_decoder_is_nine_shifted_sums_with_zeros_outside(tiny_network: CausalCLIPSeg) -> None:
    rng = np.random.default_rng(1)
    features, kernel = rng.standard_normal((2, 4, 6, 5)), rng.standard_normal((3, 9, 5))
    tap_bias, bias = rng.standard_normal((3, 9)), rng.standard_normal(3)
    expected = np.empty((2, 3, 4, 6))
    for b, p, y, x in np.ndindex(expected.shape):
        total = bias[p]
        for tap in range(9):
            row, column = y + tap // 3 - 1, x + tap % 3 - 1
            if 0 <= row < 4 and 0 <= column < 6:
                total += kernel[p, tap] @ features[b, row, column] + tap_bias[p, tap]
        expected[b, p, y, x] = total
    arrays = {"features": features, "kernel": kernel, "tap_bias": tap_bias, "bias": bias}
    logits = PyTorchBackend(tiny_network).run("mask_decoder", arrays)["logits"]  # float64 in, float64 out
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def test_encoders_and_decoder_one_after_another_are_the_network(tiny_network: CausalCLIPSeg) -> None:
    image, tokens = inputs(1, 3)
    backend = PyTorchBackend(tiny_network)
    encoded = backend.run("image_encoder", {"image": image})
    kernels = backend.run("prompt_encoder", {"tokens": tokens})
    width = TINY.feature_width
    assert {name: value.shape for name, value in kernels.items()} == {
        "kernel": (3, 9, width), "tap_bias": (3, 9), "bias": (3,),
    }  # fmt: skip
    logits = backend.run("mask_decoder", {"features": encoded["features"], **kernels})["logits"]
    assert distance(logits, backend.all_pairs(image, tokens)) <= 1e-5


def test_image_encoder_gives_masks_and_confounding_features_too(tiny_network: CausalCLIPSeg) -> None:
    image, _ = inputs(2, 1)
    outputs = PyTorchBackend(tiny_network).run("image_encoder", {"image": image})
    assert outputs.keys() == {"features", "mask3", "mask4", "mask5", "confounding_features"}
    assert outputs["features"].shape == (2, *IMAGE_HW, TINY.feature_width)
    for level in (3, 4, 5):
        mask = outputs[f"mask{level}"]
        assert mask.shape == (2, TINY.neck_width, IMAGE_HW[0] // 16, IMAGE_HW[1] // 16)
        assert (mask >= 0).all()
        assert (mask <= 1).all()


def test_the_model_runs_in_evaluation_mode(tiny_network: CausalCLIPSeg) -> None:
    image, tokens = inputs(1, 1)
    expected = PyTorchBackend(tiny_network).all_pairs(image, tokens)
    model = deepcopy(tiny_network).train()
    np.testing.assert_array_equal(PyTorchBackend(model).all_pairs(image, tokens), expected)
    assert not model.training
    for name, value in tiny_network.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_an_unknown_graph_raises_with_the_known_ones(tiny_network: CausalCLIPSeg) -> None:
    backend = PyTorchBackend(tiny_network)
    backend.load("anything")
    with pytest.raises(UsageError, match="no graph 'row_decoder'; it has prompt_encoder"):
        backend.run("row_decoder", {})
