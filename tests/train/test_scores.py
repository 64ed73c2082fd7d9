"""Dice, the shuffle, the bootstrap, and the evaluation of a predictor whose score is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cclip_deploy.data.layouts import Referral, read_flat, read_mask
from cclip_deploy.data.synthetic import write_dataset
from cclip_deploy.errors import DataError, UsageError
from cclip_deploy.train.scores import dice, evaluate_dice, shuffle_prompts


@pytest.fixture(scope="module")
def referrals(tmp_path_factory: pytest.TempPathFactory) -> list[Referral]:
    folder = tmp_path_factory.mktemp("scores") / "data"
    write_dataset(folder, {"test": 5}, (32, 48), seed=0, prompts_per_film=2)
    return read_flat(folder)


def test_dice_of_known_masks() -> None:
    a, b, none = np.array([[1, 1, 0, 0]], bool), np.array([[0, 1, 1, 1]], bool), np.zeros((1, 4), bool)
    assert dice(a, b) == 2 * 1 / 5
    assert dice(a, a) == 1.0
    assert dice(a, none) == 0.0
    assert dice(none, none) == 1.0, "the policy: empty against empty is right"


def test_dice_refuses_masks_of_two_sizes() -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        dice(np.zeros((1, 4), bool), np.zeros((2, 4), bool))


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.integers(0, 5))
def test_shuffled_prompts_are_the_same_texts_and_none_stays(texts: list[str], seed: int) -> None:
    if 2 * max(map(texts.count, texts)) > len(texts):
        with pytest.raises(DataError, match="leaves some row its own"):
            shuffle_prompts(texts, seed)
        return
    shuffled = shuffle_prompts(texts, seed)
    assert sorted(shuffled) == sorted(texts)
    assert all(a != b for a, b in zip(texts, shuffled, strict=True))


def test_the_shuffle_depends_on_the_seed_alone() -> None:
    texts = list("aabbccddeeff")
    assert shuffle_prompts(texts, 1) == shuffle_prompts(texts, 1)
    assert shuffle_prompts(texts, 1) != shuffle_prompts(texts, 2)


def test_a_predictor_that_obeys_the_prompt_scores_one_and_loses_all_that_shuffling_takes(
    referrals: list[Referral],
) -> None:
    """The oracle answers with the mask of the row that has this picture and prompt, and with nothing to any other."""
    masks = {(row.text, read_mask(row.mask).sum()): read_mask(row.mask) for row in referrals}
    answers = {(row.image.read_bytes(), row.text): read_mask(row.mask) for row in referrals}
    assert len(masks) == len(answers) == len(referrals)
    pictures = {row.image: row.image.read_bytes() for row in referrals}
    asked: list[str] = []

    def obey(pixels: NDArray[np.float32], prompt: str) -> NDArray[np.float32]:
        asked.append(prompt)
        image = next(p for p in pictures if np.array_equal(_pixels(p), pixels))
        return answers.get((pictures[image], prompt), np.zeros(pixels.shape[:2], bool)).astype(np.float32)

    scores = evaluate_dice(obey, referrals)
    assert scores.true.value == 1.0
    assert asked[::2] == [row.text for row in referrals]
    assert all(asked[1::2][i] != row.text for i, row in enumerate(referrals))
    assert scores.shuffled.value is not None
    assert scores.drop.value == pytest.approx(1 - scores.shuffled.value)
    assert scores.shuffled.value < 0.5
    assert (scores.true.rows, scores.true.patients) == (10, 5)


def test_a_predictor_deaf_to_the_prompt_loses_nothing(referrals: list[Referral]) -> None:
    def ignore(pixels: NDArray[np.float32], prompt: str) -> NDArray[np.float32]:
        return np.full(pixels.shape[:2], 0.5, np.float32)

    scores = evaluate_dice(ignore, referrals)
    areas = [read_mask(row.mask).mean() for row in referrals]
    assert scores.true.value == pytest.approx(np.mean([2 * area / (1 + area) for area in areas])), (
        "0.5 counts as inside"
    )
    assert scores.drop.value == 0.0
    assert (scores.drop.low, scores.drop.high) == pytest.approx((0.05**0.2 - 1, 1 - 0.05**0.2)), "five patients agree"


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate_dice(lambda pixels, prompt: pixels, [])


def _pixels(path: Path) -> NDArray[np.float32]:
    from PIL import Image

    return np.asarray(Image.open(path), np.float32) / np.float32(255)
