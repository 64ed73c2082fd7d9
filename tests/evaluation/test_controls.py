"""Tests of the prompt controls."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cclip_deploy.evaluation.controls import (
    FEWEST_DRAWN,
    MEANINGS,
    NEUTRAL,
    NO_SIDE,
    NOT_UNDERSTOOD,
    ONLY_MEANING,
    SAME_MEANING,
    Control,
    make_controls,
)

LEFT = "Unilateral pulmonary infection, one infected area, upper left lung."
RIGHT = "Unilateral pulmonary infection, one infected area, upper right lung."
BOTH = "Bilateral pulmonary infection, two infected areas, upper left lung and upper right lung."
FREE = "Leftmost nodule"


def controls(*texts: str) -> dict[str, Control]:
    made = {control.name: control for control in make_controls(texts)}
    assert list(made) == list(MEANINGS)
    return made


def sentences(control: Control) -> list[str | None]:
    """Return the single prompt of every row, or None."""
    assert all(len(row) <= 1 and set(row.values()) <= {1.0} for row in control.prompts)
    return [next(iter(row), None) for row in control.prompts]


def test_shuffled_weights_other_prompts_by_their_rows() -> None:
    shuffled = controls(LEFT, RIGHT, RIGHT, BOTH, FREE)["shuffled"]
    assert shuffled.prompts[0] == {RIGHT: 2 / 4, BOTH: 1 / 4, FREE: 1 / 4}
    assert shuffled.prompts[1] == shuffled.prompts[2] == {LEFT: 1 / 3, BOTH: 1 / 3, FREE: 1 / 3}
    assert (shuffled.drawn, shuffled.missing) == (None, None)


def test_shuffled_without_sampling_does_not_depend_on_the_seed() -> None:
    texts = [LEFT, RIGHT, RIGHT, BOTH, FREE] * 3
    assert make_controls(texts, seed=1)[0] == make_controls(texts, seed=2)[0]


def test_prompts_of_the_same_meaning_are_not_controls() -> None:
    """Another wording of the same meaning would dilute the difference."""
    same = "Opacity in the left upper zone"
    made = controls(LEFT, same, RIGHT)
    assert made["shuffled"].prompts == ({RIGHT: 1.0}, {RIGHT: 1.0}, {LEFT: 0.5, same: 0.5})
    assert sentences(controls(LEFT, LEFT, same)["fixed"]) == [None, None, None]
    assert controls(LEFT, LEFT, same)["shuffled"].reasons == (ONLY_MEANING,) * 3


def test_sampled_prompts_are_stratified_and_unbiased() -> None:
    texts = [f"case {n % 40 if n < 200 else 0}" for n in range(300)]
    exact = make_controls(texts)[0].prompts[0]
    tallies: Counter[str] = Counter()
    for seed in range(40):
        control = make_controls(texts, seed, most_answers=2000)[0]
        assert control.drawn == FEWEST_DRAWN
        assert "8 sampled per row" in control.meaning
        assert all(sum(row.values()) == pytest.approx(1) and text not in row
                   for text, row in zip(texts, control.prompts, strict=True))  # fmt: skip
        for row in control.prompts[:1]:
            tallies.update(row)
    drawn = np.array([tallies[text] / 40 for text in exact])
    assert abs(drawn - list(exact.values())).max() < 0.03
    halves = make_controls(texts, 0, most_answers=2000)[0].prompts[1]
    assert Counter(halves)["case 0"] == pytest.approx(105 / 295, abs=1 / 8), "a stratum is an eighth of the others"
    assert make_controls(texts, 3, 2000)[0] == make_controls(texts, 3, 2000)[0] != make_controls(texts, 4, 2000)[0]
    assert make_controls(texts, 3, 6000)[0].drawn == 20


def test_rows_whose_own_prompt_is_the_control_are_left_out() -> None:
    assert sentences(controls(LEFT, RIGHT, LEFT)["fixed"]) == [None, LEFT, None]
    assert sentences(controls(NEUTRAL, RIGHT)["neutral"]) == [None, NEUTRAL]
    assert sentences(controls(LEFT, RIGHT)["empty"]) == ["", ""]
    assert controls(LEFT, RIGHT, LEFT)["fixed"].reasons == (SAME_MEANING, "", SAME_MEANING)


def test_sides_are_swapped_only_if_the_meaning_reliably_changes() -> None:
    """An earlier version did not change the meaning of 1,108 of 2,107 real prompts."""
    real = "{} pulmonary infection involving {} regions with involvement of {}"
    all_lungs = real.format("Bilateral", "two", "all right lung and all left lung")
    one = real.format("Bilateral", "two", "the lower left lung and the upper right lung")
    swapped = controls(
        LEFT, RIGHT, BOTH, FREE, all_lungs, one, "both lower lobes", "bilateral pneumonia", "a polyp", "left ventricle"
    ).pop("side-swapped")
    assert sentences(swapped) == [
        RIGHT, LEFT, None, None, None, one.replace("left", "X").replace("right", "left").replace("X", "right"),
        None, None, None, None,
    ]  # fmt: skip
    assert swapped.reasons == ("", "", SAME_MEANING, NOT_UNDERSTOOD, SAME_MEANING, "", SAME_MEANING, SAME_MEANING,
                               NO_SIDE, NOT_UNDERSTOOD)  # fmt: skip
    assert swapped.missing is None


def test_a_control_without_rows_has_a_reason() -> None:
    made = controls(FREE)
    assert ONLY_MEANING in str(made["shuffled"].missing)
    assert SAME_MEANING in str(made["fixed"].missing)
    assert NOT_UNDERSTOOD in str(made["side-swapped"].missing)
    assert made["empty"].missing is None
