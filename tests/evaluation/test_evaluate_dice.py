"""Tests of `evaluate_dice` with networks of known predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cclip_deploy.datasets.flat import read_flat
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.datasets.synthetic.generator import write_dataset
from cclip_deploy.errors import DataError
from cclip_deploy.evaluation.evaluate import DiceScores, evaluate_dice
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.prompts.tokenizer import PromptTokenizer

Answer = Callable[[np.ndarray, bytes], np.ndarray]


class Known:
    """Network whose predictions are given by a function."""

    threshold, prompt_length = 0.5, 40

    def __init__(self, rule: Answer) -> None:
        self.tokenizer, self.rule = PromptTokenizer.from_open_clip(), rule

    def answer(self, pixels: np.ndarray, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        return (self.rule(pixels, row.tobytes()) for row in rows)

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("scores") / "data"
    write_dataset(folder, {"test": 8}, (32, 48), seed=0, prompts_per_image=3)
    return read_flat(folder)


def tokens(text: str) -> bytes:
    return PromptTokenizer.from_open_clip().encode_cut(text, Known.prompt_length).tobytes()


def obey(samples: Sequence[Sample]) -> Answer:
    """Return a rule that predicts the mask of the row with this image and prompt, or an empty mask."""
    answers = {(read_image(r.image).pixels.tobytes(), tokens(r.text)): read_mask(r.mask) for r in samples}
    return lambda pixels, row: answers.get((pixels.tobytes(), row), np.zeros(pixels.shape[:2], bool)).astype(np.float32)


def test_shuffled_dice_is_the_mean_over_all_other_prompts(samples: list[Sample]) -> None:
    scores = evaluate_dice(Known(obey(samples)), samples)
    expected = []
    for row in samples:
        truth, others = read_mask(row.mask), [r for r in samples if r.text != row.text]
        masks = [
            next((read_mask(r.mask) for r in samples if (r.image, r.text) == (row.image, other.text)), truth & False)
            for other in others
        ]
        expected.append(np.mean([2 * (m & truth).sum() / (m.sum() + truth.sum()) for m in masks]))
    assert scores.true.value == 1
    assert scores.shuffled.value == pytest.approx(np.mean(expected))
    assert scores.drop.value == pytest.approx(1 - np.mean(expected))
    assert (scores.true.rows, scores.true.patients) == (len(samples), 8)


def test_the_shuffled_estimate_does_not_depend_on_the_seed(samples: list[Sample]) -> None:
    """It did in an earlier version, which rotated the prompts by a random offset."""
    network = Known(obey(samples))
    scores: list[DiceScores] = [evaluate_dice(network, samples, seed=seed) for seed in range(3)]
    assert len({found.shuffled.value for found in scores}) == 1
    assert len({found.drop.value for found in scores}) == 1


def test_a_network_that_ignores_the_prompt_has_no_drop(samples: list[Sample]) -> None:
    scores = evaluate_dice(Known(lambda pixels, row: np.full(pixels.shape[:2], 0.5, np.float32)), samples)
    areas = [read_mask(row.mask).mean() for row in samples]
    assert scores.true.value == pytest.approx(np.mean([2 * area / (1 + area) for area in areas])), "0.5 is inside"
    assert scores.drop.value == pytest.approx(0)


def test_missing_rows_or_prompts_are_an_error(samples: list[Sample], tmp_path: Path) -> None:
    network = Known(lambda pixels, row: pixels)
    with pytest.raises(DataError, match="no rows"):
        evaluate_dice(network, [])
    with pytest.raises(DataError, match="no other prompts"):
        evaluate_dice(network, samples[:1])
