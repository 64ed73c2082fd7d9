"""Explanations from a bundle's outputs and from its checkpoint, and their plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import CheckpointError, UsageError
from cclip_deploy.inference.explain import BundleExplainer, CheckpointExplainer, open_explainer
from cclip_deploy.inference.explanation_plot import write_explanation
from cclip_deploy.inference.predict import PredictOptions, predict
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from tests.bundles import copy_of, reseal
from tests.conftest import THREADS, TINY_HW, random_network

PROMPT = "lower left lung"
PIXELS = np.random.default_rng(2).random((48, 60), np.float32)


def segmenter_of(path: Path) -> Segmenter:
    bundle = Bundle.open(path)
    return Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, "fp32", "cpu", THREADS))


@pytest.fixture
def segmenter(tiny_bundle_path: Path) -> Segmenter:
    return segmenter_of(tiny_bundle_path)


@pytest.fixture
def by_checkpoint(tiny_bundle: Bundle, tiny_checkpoint: Path) -> CheckpointExplainer:
    return CheckpointExplainer(tiny_bundle, load_checkpoint(tiny_checkpoint))


def test_masks_of_bundle_and_checkpoint_agree(
    tiny_bundle: Bundle, segmenter: Segmenter, by_checkpoint: CheckpointExplainer
) -> None:
    theirs, ours = by_checkpoint.look(PIXELS), BundleExplainer(tiny_bundle, segmenter).look(PIXELS)
    assert list(ours.masks) == ["M3", "M4", "M5"]
    for name, mask in ours.masks.items():
        assert mask.shape == (TINY_HW[0] // 16, TINY_HW[1] // 16)
        assert 0 < mask.min() < mask.max() < 1
        np.testing.assert_allclose(mask, theirs.masks[name], atol=1e-4)
    assert ours.confounding is None
    assert theirs.confounding is not None


def test_one_image_pass_gives_answer_and_explanation(tiny_bundle: Bundle, segmenter: Segmenter) -> None:
    seen = BundleExplainer(tiny_bundle, segmenter).look(PIXELS)
    assert seen.features is not None
    (with_features,) = segmenter.probabilities(PIXELS, [PROMPT], seen.features)
    (alone,) = segmenter.probabilities(PIXELS, [PROMPT])
    np.testing.assert_array_equal(with_features, alone)


def test_the_confounding_answer_is_the_networks_second_output(by_checkpoint: CheckpointExplainer) -> None:
    import torch

    from cclip_deploy.imaging.preprocess import Preprocessing, to_input, to_source

    assert by_checkpoint.confounding_answer(PROMPT) is None
    by_checkpoint.look(PIXELS)
    image = torch.from_numpy(to_input(PIXELS, TINY_HW, Preprocessing()))
    tokens = torch.from_numpy(by_checkpoint._tokenizer.encode(PROMPT, 24))[None]
    with torch.inference_mode():
        logits = random_network()(image, tokens).confounding
    expected = to_source(torch.sigmoid(logits)[0, 0].numpy(), (48, 60))
    answer = by_checkpoint.confounding_answer(PROMPT)
    assert answer is not None
    np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_a_bundle_without_further_outputs_says_how_to_get_them(
    tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bare = copy_of(tiny_bundle_path, tmp_path)
    reseal(bare, _forget_masks)
    with pytest.raises(UsageError, match="--with-masks --with-confounding") as caught:
        open_explainer(Bundle.open(bare), segmenter_of(bare), None)
    assert "--checkpoint" in str(caught.value)
    assert len(open_explainer(Bundle.open(bare), segmenter_of(bare), tiny_checkpoint).look(PIXELS).masks) == 3


def _forget_masks(manifest: dict[str, Any]) -> None:
    encoder = manifest["graphs"]["image_encoder"]
    encoder["outputs"] = [output for output in encoder["outputs"] if not output["name"].startswith("mask")]


def test_another_checkpoint_is_refused(tiny_bundle: Bundle, segmenter: Segmenter, tmp_path: Path) -> None:
    save_checkpoint(random_network(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="was exported from"):
        open_explainer(tiny_bundle, segmenter, tmp_path / "other.safetensors")


def test_predict_draws_an_explanation_beside_every_mask(
    tiny_bundle: Bundle, segmenter: Segmenter, tmp_path: Path
) -> None:
    Image.fromarray(np.uint8(PIXELS * 255)).save(tmp_path / "film.png")
    found = predict(segmenter, [tmp_path / "film.png"], [PROMPT, "$right$"], tmp_path / "out",
                    PredictOptions(explainer=BundleExplainer(tiny_bundle, segmenter)))  # fmt: skip
    names = [Path(str(row.explanation)).name for row in found.done]
    assert names == ["film-lower-left-lung-explanation.png", "film-right-explanation.png"]
    assert found.done[0].to_dict()["files"]["explanation"].endswith(names[0])  # type: ignore[index]
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.width > 800
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_without_an_explainer_nothing_more_is_written(segmenter: Segmenter, tmp_path: Path) -> None:
    Image.fromarray(np.uint8(PIXELS * 255)).save(tmp_path / "film.png")
    found = predict(segmenter, [tmp_path / "film.png"], [PROMPT], tmp_path / "out")
    assert "explanation" not in found.done[0].to_dict()["files"]  # type: ignore[operator]


def test_an_explanation_shows_all_that_a_checkpoint_gives(by_checkpoint: CheckpointExplainer, tmp_path: Path) -> None:
    seen = by_checkpoint.look(PIXELS)
    answer = by_checkpoint.confounding_answer(PROMPT)
    nothing = np.zeros(PIXELS.shape, np.bool_)
    path = write_explanation(tmp_path / "a.png", PIXELS, nothing, PROMPT * 20, seen, answer)
    bare = write_explanation(tmp_path / "b.png", PIXELS, nothing, PROMPT, type(seen)(seen.masks, None, None), None)
    with Image.open(path) as every, Image.open(bare) as masks:
        assert every.size == masks.size  # two rows of three panels each
        assert np.asarray(every.convert("L"))[-200:, -300:].std() > np.asarray(masks.convert("L"))[-200:, -300:].std()
