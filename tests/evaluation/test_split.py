"""Tests of evaluating a split: network passes, controls, cases and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.errors import DataError, ImageError
from cclip_deploy.evaluation.controls import Control, make_controls
from cclip_deploy.evaluation.split import MeasurementOptions, TopCases, measure_split
from cclip_deploy.prompts.tokenizer import PromptTokenizer

HW = (20, 30)
OPTIONS = MeasurementOptions(threshold=0.5, tolerance_px=2.0, worst=3)


class TopRows:
    """Network that predicts as many rows from the top as the prompt has words, and counts passes and prompts."""

    threshold, prompt_length = 0.5, 8

    def __init__(self) -> None:
        self.tokenizer = PromptTokenizer.from_open_clip()
        self.passes: list[int] = []

    def answer(self, pixels: np.ndarray, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        self.passes.append(len(rows))
        for row in rows:
            probability = np.full(pixels.shape[:2], 0.25, np.float32)
            probability[: np.count_nonzero(row) - 2] = 0.75
            yield probability

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def network() -> TopRows:
    return TopRows()


def write(folder: Path, name: str, inside_rows: int) -> Path:
    mask = np.zeros(HW, np.uint8)
    mask[:inside_rows] = 255
    Image.fromarray(mask).save(folder / name)
    return folder / name


def samples(folder: Path, *rows: tuple[str, str, int]) -> list[Sample]:
    """Return samples from (image, text, number of mask rows inside)."""
    made = []
    for number, (image, text, inside) in enumerate(rows):
        path = folder / f"{image}.png"
        if not path.exists():
            Image.new("L", HW[::-1], 90).save(path)
        made.append(Sample(path, write(folder, f"mask{number}.png", inside), text, "test", image))
    return made


def test_each_image_is_encoded_once_and_each_prompt_decoded_once(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 1), ("b", "two words", 2), ("a", "three more words", 3))
    network.passes.clear()
    reported: list[tuple[str, int, int]] = []
    controls = [Control.single("fixed", ("one",) * 3), Control.single("empty", ("", None, ""))]
    measure_split(network, rows, controls, OPTIONS,
                  lambda path, number, total: reported.append((path.name, number, total)))  # fmt: skip
    assert network.passes == [3, 2]  # a: one, three more words, empty; b: two words, one
    assert reported == [("a.png", 1, 2), ("b.png", 2, 2)]


def test_rows_keep_their_order(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 1), ("b", "two words", 4), ("a", "three more words", 3))
    found = measure_split(network, rows, [], OPTIONS).rows
    assert [row.overlap.dice for row in found] == pytest.approx([1, 2 * 2 / 6, 1])
    assert [row.pixels for row in found] == [600] * 3
    assert [int(row.histogram.inside.sum()) for row in found] == [30, 120, 90]


def test_a_control_is_compared_with_the_rows_reference_and_own_prediction(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 2), ("a", "three more words", 3))
    shuffled = Control.single("shuffled", ("three more words", "one"))
    first, second = measure_split(network, rows, [shuffled], OPTIONS).rows
    assert first.controls["shuffled"].dice == pytest.approx(2 * 2 / 5)
    assert first.controls["shuffled"].iou_with_own == pytest.approx(1 / 3)
    assert second.controls["shuffled"].dice == pytest.approx(2 * 1 / 4)


def test_a_control_of_several_prompts_is_their_weighted_mean(tmp_path: Path, network: TopRows) -> None:
    """Compare with NumPy. The row's own prompt is among the control's, as a truncated prompt may be."""
    rows = samples(tmp_path, ("a", "one", 2), ("a", "three more words", 3), ("b", "two words", 1))
    table = {"one": 0.5, "two words": 0.125, "five words are too many": 0.375}
    network.passes.clear()
    found = measure_split(network, rows, [Control("shuffled", (table, table, {}), ("", "", "left out"))], OPTIONS).rows
    assert network.passes == [4, 1]
    for row, (own, inside) in zip(found, ((1, 2), (3, 3)), strict=False):
        dice = sum(w * 2 * min(k, inside) / (k + inside) for k, w in ((1, 0.5), (2, 0.125), (5, 0.375)))
        iou = sum(w * min(k, own) / max(k, own) for k, w in ((1, 0.5), (2, 0.125), (5, 0.375)))
        assert row.controls["shuffled"].dice == pytest.approx(dice)
        assert row.controls["shuffled"].iou_with_own == pytest.approx(iou)
    assert found[2].controls == {}


def test_the_empty_control_has_only_start_and_end_tokens(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 2), ("b", "two words", 2))
    found = measure_split(network, rows, make_controls([row.text for row in rows]), OPTIONS).rows
    assert [row.controls["empty"].iou_with_own for row in found] == [0, 0]
    assert "side-swapped" not in found[0].controls


def test_long_prompts_are_truncated_and_counted(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 1), ("b", "this sentence has more words than fit", 6))
    found = measure_split(network, rows, [], OPTIONS).rows
    assert [row.cut for row in found] == [False, True]
    assert found[1].overlap.dice == 1  # six of its seven words are left


def test_worst_cases_and_false_positives_are_separate(tmp_path: Path, network: TopRows) -> None:
    rows = samples(
        tmp_path, ("a", "one", 9), ("b", "two words", 2), ("c", "three more words", 0), ("d", "one", 1), ("e", "one", 0)
    )
    found = measure_split(network, rows, [], MeasurementOptions(0.5, 2.0, worst=2))
    assert [case.row for case in found.worst] == [0, 1]
    assert [case.row for case in found.false_positives] == [2, 4]
    expected = np.zeros(HW, np.bool_)
    expected[:3] = True
    np.testing.assert_array_equal(found.false_positives[0].mask(), expected)
    assert found.rows[2].boundary is None


def test_top_cases_hold_at_most_count_masks() -> None:
    worst, mask = TopCases(2), np.ones((3, 5), np.bool_)
    for row, score in enumerate([0.1, 0.9, 0.5, 0.9, 0.2]):
        worst.add(row, score, mask)
    assert [case.row for case in worst.cases()] == [1, 3]
    none = TopCases(0)
    none.add(0, 1.0, mask)
    assert none.cases() == ()


def test_a_prompt_without_a_word_is_an_error(tmp_path: Path, network: TopRows) -> None:
    with pytest.raises(DataError, match="holds no word"):
        measure_split(network, samples(tmp_path, ("a", " \t", 1)), [], OPTIONS)


def test_a_damaged_image_is_an_error_that_names_it(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 1), ("b", "one", 1))
    rows[1].image.write_bytes(rows[1].image.read_bytes()[:40])
    with pytest.raises(ImageError, match=r"b\.png"):
        measure_split(network, rows, [], OPTIONS)


def test_a_mask_of_another_size_is_an_error(tmp_path: Path, network: TopRows) -> None:
    rows = samples(tmp_path, ("a", "one", 1))
    Image.new("L", (4, 4)).save(rows[0].mask)
    with pytest.raises(DataError, match=r"is \(4, 4\)"):
        measure_split(network, rows, [], OPTIONS)
