"""The segmenter encodes each image and each prompt once, and its results do not depend on their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ParityError, PromptError, UsageError
from cclip_deploy.imaging.preprocess import to_input, to_source
from cclip_deploy.inference.graph_chain import PROMPTS_AT_ONCE, sigmoid
from cclip_deploy.inference.prompt_cache import CacheCounts, PromptCache
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.pytorch import PyTorchBackend
from tests.bundles import copy_of, flip_byte, reseal

FILM = np.random.default_rng(3).random((50, 40), np.float32)
PROMPTS = ["left lung", "Two infected areas, upper right.", "heart", "lower left lung"]


class Recording:
    """A backend that notes which graph was run on how many rows."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.precision = backend.name, backend.precision
        self.runs: list[tuple[str, int]] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []

    def load(self, graph: str) -> None:
        self.loads.append(graph)

    def unload(self, graph: str) -> None:
        self.unloads.append(graph)
        self.backend.unload(graph)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = {"image_encoder": "image", "prompt_encoder": "tokens", "mask_decoder": "bias"}[graph]
        self.runs.append((graph, len(inputs[rows])))
        return self.backend.run(graph, inputs)


class Formula:
    """A network in one line: features are the mean of the channels, the logit is that times the prompt's first word."""

    name, precision = "formula", "fp32"

    def load(self, graph: str) -> None: ...

    def unload(self, graph: str) -> None: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if graph == "image_encoder":
            return {"features": inputs["image"].mean(axis=1, keepdims=True)}
        if graph == "prompt_encoder":
            word = inputs["tokens"][:, 1].astype(np.float32) / 49408
            return {"kernel": np.zeros((len(word), 9, 1), np.float32), "tap_bias": np.zeros((len(word), 9), np.float32),
                    "bias": word}  # fmt: skip
        return {"logits": inputs["features"] * inputs["bias"][None, :, None, None]}


@pytest.fixture
def recording(tiny_bundle: Bundle) -> Recording:
    return Recording(OnnxRuntimeBackend(tiny_bundle, threads=2))


@pytest.fixture
def segmenter(tiny_bundle: Bundle, recording: Recording) -> Segmenter:
    return Segmenter.of_bundle(tiny_bundle, recording)


def test_probabilities_are_the_plain_networks_in_the_pictures_size(
    segmenter: Segmenter, tiny_bundle: Bundle, tiny_network: CausalCLIPSeg
) -> None:
    manifest, tokenizer = tiny_bundle.manifest, tiny_bundle.tokenizer()
    image = to_input(FILM, manifest.image_hw, manifest.preprocessing)
    tokens = np.stack([tokenizer.encode(prompt, 24) for prompt in PROMPTS])
    logits = PyTorchBackend(tiny_network).all_pairs(image, tokens)[0].astype(np.float64)
    for probability, row in zip(segmenter.probabilities(FILM, PROMPTS), logits, strict=True):
        expected = to_source((1 / (1 + np.exp(-row))).astype(np.float32), FILM.shape)
        assert probability.shape == FILM.shape
        assert probability.dtype == np.float32
        np.testing.assert_allclose(probability, expected, atol=2e-5)


def test_many_prompts_take_one_image_pass(segmenter: Segmenter, recording: Recording) -> None:
    assert len(list(segmenter.probabilities(FILM, PROMPTS))) == 4
    assert recording.runs == [("prompt_encoder", 4), ("image_encoder", 1), ("mask_decoder", 4)]


def test_a_prompt_is_computed_once_for_all_pictures_and_repetitions(segmenter: Segmenter, recording: Recording) -> None:
    first = list(segmenter.probabilities(FILM, [PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    np.testing.assert_array_equal(first[0], first[2])
    list(segmenter.probabilities(FILM[:20], [PROMPTS[1], PROMPTS[2]]))
    encoded = [rows for graph, rows in recording.runs if graph == "prompt_encoder"]
    assert encoded == [2, 1]


def test_results_do_not_depend_on_order_or_number_of_prompts(tiny_bundle: Bundle) -> None:
    def fresh(prompts: list[str]) -> dict[str, np.ndarray]:
        segmenter = Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=2))
        return dict(zip(prompts, segmenter.probabilities(FILM, prompts), strict=True))

    together = fresh(PROMPTS)
    for prompts in ([PROMPTS[2]], PROMPTS[::-1], [*PROMPTS[1:], *(f"rib {n}" for n in range(20)), PROMPTS[0]]):
        for prompt, probability in fresh(prompts).items():
            if prompt in together:
                np.testing.assert_allclose(probability, together[prompt], atol=1e-5)
    assert np.abs(together[PROMPTS[0]] - together[PROMPTS[1]]).max() > 1e-3


def test_ten_thousand_prompts_run_in_small_batches(tiny_bundle: Bundle) -> None:
    recording = Recording(Formula())
    segmenter = Segmenter.of_bundle(tiny_bundle, recording)
    prompts = [f"nodule {n}" for n in range(10_000)]
    answers = segmenter.probabilities(FILM, prompts)
    next(answers)
    assert recording.runs[-1] == ("mask_decoder", PROMPTS_AT_ONCE)  # the others are not computed before they are asked
    assert Counter(graph for graph, _ in recording.runs)["mask_decoder"] == 1
    assert sum(1 for _ in answers) == 9_999
    runs = Counter(graph for graph, _ in recording.runs)
    assert runs == {"image_encoder": 1, "prompt_encoder": 625, "mask_decoder": 625}
    assert max(rows for _, rows in recording.runs) <= 16


def test_many_prompts_stay_in_order(tiny_bundle: Bundle) -> None:
    segmenter = Segmenter.of_bundle(tiny_bundle, Formula())
    prompts = [word for _ in range(7) for word in ("heart", "lung", "rib", "spine", "heart")]
    answers = list(segmenter.probabilities(FILM, prompts))
    alone = {word: next(segmenter.probabilities(FILM, [word])) for word in set(prompts)}
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer, alone[prompt])


def test_decode_returns_every_prompt_on_every_image(segmenter: Segmenter) -> None:
    features = np.concatenate([segmenter.encode_image(FILM), segmenter.encode_image(FILM[::-1])])
    kernels = segmenter.encode_prompts([f"rib {n}" for n in range(18)])
    assert len(kernels) == 18
    logits = segmenter.decode(features, kernels)
    assert logits.shape == (2, 18, 64, 96)
    one = segmenter.decode(features[1:], kernels.part(17, 18))
    np.testing.assert_allclose(logits[1, 17], one[0, 0], rtol=1e-4, atol=1e-5)


def test_color_of_equal_channels_is_gray(segmenter: Segmenter) -> None:
    gray = next(segmenter.probabilities(FILM, PROMPTS[:1]))
    color = next(segmenter.probabilities(np.repeat(FILM[..., None], 3, axis=2), PROMPTS[:1]))
    np.testing.assert_array_equal(gray, color)


@pytest.mark.parametrize(
    ("prompts", "error", "said"),
    [
        ([], UsageError, "no prompt"),
        (["lung", "  "], PromptError, "empty"),
        (["lung " * 30], PromptError, "room for 24"),
    ],
)
def test_prompts_are_refused_before_anything_is_computed(
    segmenter: Segmenter, recording: Recording, prompts: list[str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        next(segmenter.probabilities(FILM, prompts))
    assert recording.runs == []


def test_warm_up_loads_the_three_graphs(segmenter: Segmenter, recording: Recording) -> None:
    segmenter.warm_up()
    assert sorted(recording.loads) == ["image_encoder", "mask_decoder", "prompt_encoder"]


def test_a_plain_bundle_is_refused(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    reseal(copy, lambda manifest: manifest.update(form="plain"))
    with pytest.raises(UsageError, match="exported with --plain"):
        Segmenter.of_bundle(Bundle.open(copy), Formula())


def test_logits_that_are_not_finite_raise(tiny_bundle: Bundle) -> None:
    class Nan(Formula):
        def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = super().run(graph, inputs)
            if graph == "mask_decoder":
                outputs["logits"] = np.full_like(outputs["logits"], np.nan)
            return outputs

    with pytest.raises(ParityError, match="not finite"):
        next(Segmenter.of_bundle(tiny_bundle, Nan()).probabilities(FILM, PROMPTS))


def test_sigmoid_is_exact_and_overflows_nowhere() -> None:
    logits = np.array([-1e30, -88, -3, 0, 0.5, 20, 1e30], np.float32)
    expected = [0, np.exp(-88.0), 1 / (1 + np.exp(3.0)), 0.5, 1 / (1 + np.exp(-0.5)), 1, 1]
    found = sigmoid(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found[3] == 0.5


def test_one_prompt_on_many_pictures_takes_one_image_pass_each(segmenter: Segmenter, recording: Recording) -> None:
    for picture in (FILM, FILM[::-1], FILM[:20]):
        list(segmenter.probabilities(picture, PROMPTS[:1]))
    assert Counter(graph for graph, _ in recording.runs) == {"image_encoder": 3, "prompt_encoder": 1, "mask_decoder": 3}
    assert segmenter.prompt_counts == CacheCounts(memory_hits=2, misses=1)


def test_a_prompt_in_the_cache_folder_is_not_computed_again_however_it_is_spelled(
    tiny_bundle: Bundle, recording: Recording, tmp_path: Path
) -> None:
    first = Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=2), tmp_path / "cache")
    expected = list(first.probabilities(FILM, PROMPTS))
    second = Segmenter.of_bundle(tiny_bundle, recording, tmp_path / "cache")
    spelled = ["  LEFT   lung ", *PROMPTS[1:]]
    for found, known in zip(second.probabilities(FILM, spelled), expected, strict=True):
        np.testing.assert_array_equal(found, known)
    assert [graph for graph, _ in recording.runs] == ["image_encoder", "mask_decoder"]
    assert second.prompt_counts == CacheCounts(disk_hits=4)


def test_a_damaged_cache_file_gives_the_mask_of_a_good_one(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def fresh() -> Segmenter:
        return Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=2), tmp_path)

    expected = next(fresh().probabilities(FILM, PROMPTS[:1]))
    (path,) = tmp_path.iterdir()
    flip_byte(path)
    again = fresh()
    np.testing.assert_array_equal(next(again.probabilities(FILM, PROMPTS[:1])), expected)
    assert again.prompt_counts == CacheCounts(rebuilt=1)


def test_preparing_computes_every_prompt_once_and_frees_the_prompt_encoder(
    segmenter: Segmenter, recording: Recording
) -> None:
    segmenter.prepare([*PROMPTS, PROMPTS[0]])
    assert (recording.runs, recording.unloads) == ([("prompt_encoder", 4)], ["prompt_encoder"])
    list(segmenter.probabilities(FILM, PROMPTS))
    list(segmenter.probabilities(FILM, ["something else"]))  # loaded again where it is needed again
    assert [rows for graph, rows in recording.runs if graph == "prompt_encoder"] == [4, 1]


def test_preparing_more_prompts_than_fit_into_memory_only_validates_them(
    segmenter: Segmenter, recording: Recording
) -> None:
    segmenter._cache = PromptCache(capacity=3)
    segmenter.prepare(PROMPTS)
    assert (recording.runs, recording.unloads) == ([], [])
    with pytest.raises(PromptError):
        segmenter.prepare([*PROMPTS, ""])
    assert len(list(segmenter.probabilities(FILM, PROMPTS))) == 4
