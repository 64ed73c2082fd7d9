"""Typing errors in prompts: those of the real tables, and what must not be touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cclip_deploy.data.repair import WORDS, Repair, repair_prompt
from cclip_deploy.data.template import ZONES, Zones, parse, parse_or_none, render

zone_sets = st.frozensets(st.sampled_from(ZONES))
sentences = st.builds(
    render, st.builds(Zones, left=zone_sets, right=zone_sets).filter(lambda z: bool(z.sites())), st.integers(1, 12)
)
RIGHT = "Bilateral pulmonary infection, two infected areas, middle lower left lung and all right lung."


@pytest.mark.parametrize(
    ("meant", "typed"),
    [
        ("middle", "mmiddle"), ("middle", "midlle"), ("left", "leff"), ("right", "rught"), ("lower", "llower"),
        ("all", "aall"), ("left lung", "leftlung"), ("all right", "allright"), ("lower left", "lower left left"),
        ("lower left lung", "lowerleftlung"), ("middle", "mid dle"), ("lung and", "lung and and"),
        ("lung and", "lung nad"),
        ("areas, middle", "areas,middle"), ("areas,", "areas"), ("infection,", "infection ,"), ("two", "tow"),
        ("infection", "infectoin"), ("pulmonary", "pulmonry"), ("Bilateral", "Bilatral"), ("areas", "aeras"),
    ],
)  # fmt: skip
def test_a_typing_error_is_repaired_to_the_sentence_meant(meant: str, typed: str) -> None:
    written = RIGHT.replace(meant, typed, 1)
    assert written != RIGHT
    repaired = repair_prompt(written)
    assert parse(repaired.text) == parse(RIGHT)
    assert repaired.repairs
    assert repaired.written == written


def test_a_repair_says_what_stood_there_and_keeps_its_capital() -> None:
    repaired = repair_prompt("Unilatral pulmonary infection, one infected area, uppper lowerright lung.")
    assert repaired.text == "Unilateral pulmonary infection, one infected area, upper lower right lung."
    assert repaired.repairs == (
        Repair("Unilatral", "Unilateral"), Repair("uppper", "upper"), Repair("lowerright", "lower right"),
    )  # fmt: skip


def test_a_short_form_is_repaired_word_by_word() -> None:
    assert repair_prompt("midlle leff lung").text == "middle left lung"
    assert repair_prompt("3 areas, uppper left lung").text == "3 areas, upper left lung", "no digit is lost"


@given(sentences)
def test_right_prompts_stay(sentence: str) -> None:
    assert repair_prompt(sentence).text == sentence
    assert repair_prompt(sentence).repairs == ()


@pytest.mark.parametrize(
    "text",
    [
        "", "A cat.", "small polyp in the lowr right colon", "middle left lung", "lower lobe of the right lung",
        "opacities in the uppper zone", "tumour", "left", "lung " * 400,
        "Bilateral pulmonary infection, one infected area, upper left lung.",
    ],
)  # fmt: skip
def test_what_is_right_or_of_another_form_stays(text: str) -> None:
    repaired = repair_prompt(text)
    assert repaired.text == text
    assert repaired.repairs == ()


def test_a_word_like_none_of_the_form_is_not_guessed() -> None:
    for word, other in (("lower", "xxxxx"), ("two", "several"), ("lower", "lobe")):
        written = RIGHT.replace(word, other)
        assert repair_prompt(written).text == written


@st.composite
def mistyped(draw: st.DrawFn) -> str:
    """A sentence with one or two letters dropped, doubled, exchanged or replaced."""
    text = draw(sentences)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text) - 2))
        kind = draw(st.sampled_from("dxrs"))
        middle = {"d": "", "x": text[at] * 2, "r": draw(st.sampled_from("aelr ,")), "s": text[at + 1] + text[at]}[kind]
        text = text[:at] + middle + text[at + (2 if kind == "s" else 1) :]
    return text


words = st.lists(st.sampled_from([*sorted(WORDS), "uppper", "lo", "wer", "leftlung", ",", ".", "polyp", "rightright"]))


@given(st.one_of(mistyped(), words.map(" ".join), st.text()))
def test_repairing_twice_repairs_nothing_more(text: str) -> None:
    once = repair_prompt(text)
    again = repair_prompt(once.text)
    assert again.text == once.text
    assert again.repairs == ()
    assert (once.text != text) == bool(once.repairs)


@given(sentences, st.integers(0, 200))
def test_a_doubled_letter_is_repaired_to_the_same_zones(sentence: str, place: int) -> None:
    letters = [at for at, letter in enumerate(sentence) if letter.isalpha()]
    at = letters[place % len(letters)]
    repaired = repair_prompt(sentence[: at + 1] + sentence[at:])
    assert parse_or_none(repaired.text) == parse_or_none(sentence)
