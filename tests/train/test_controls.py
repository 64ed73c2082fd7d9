"""Other sentences for the same pictures."""

from __future__ import annotations

from cclip_deploy.train.controls import MEANINGS, NEUTRAL, Control, make_controls

LEFT = "Unilateral pulmonary infection, one infected area, upper left lung."
RIGHT = "Unilateral pulmonary infection, one infected area, upper right lung."
BOTH = "Bilateral pulmonary infection, two infected areas, upper left lung and upper right lung."
FREE = "Leftmost nodule"


def controls(*texts: str) -> dict[str, Control]:
    made = {control.name: control for control in make_controls(texts)}
    assert list(made) == list(MEANINGS)
    return made


def test_shuffled_rows_all_get_another_sentence() -> None:
    texts = (LEFT, RIGHT, BOTH, FREE)
    shuffled = controls(*texts)["shuffled"].texts
    assert sorted(str(text) for text in shuffled) == sorted(texts)
    assert all(own != other for own, other in zip(texts, shuffled, strict=True))


def test_rows_that_would_get_their_own_sentence_are_left_out() -> None:
    assert controls(LEFT, RIGHT, LEFT)["fixed"].texts == (None, LEFT, None)
    assert controls(NEUTRAL, RIGHT)["neutral"].texts == (None, NEUTRAL)
    assert controls(LEFT, RIGHT)["empty"].texts == ("", "")


def test_sides_are_swapped_where_that_changes_the_sentence_and_is_sure() -> None:
    swapped = controls(LEFT, RIGHT, BOTH, FREE, "the left kidney").pop("side-swapped")
    assert swapped.texts == (RIGHT, LEFT, None, None, "the right kidney")
    assert swapped.missing is None


def test_a_control_that_no_row_can_have_says_why() -> None:
    made = controls(FREE)
    assert "shuffling leaves some row its own" in str(made["shuffled"].missing)
    assert made["fixed"].missing == "Every row has this sentence itself."
    assert made["side-swapped"].missing == "No sentence names a side that can be exchanged."
    assert made["empty"].missing is None
