"""Repairing spelling errors of published tables, and words that must not change."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cclip_deploy.prompts.reader import read_prompt
from cclip_deploy.prompts.spelling import KNOWN, LONGEST, Repair, repair_prompt, repair_prompts, respell
from cclip_deploy.prompts.template import ZONES, Zones, parse_facts, parse_or_none, render
from tests.prompts.wordings import DEV, HELD_OUT, make, mistype

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
    assert parse_facts(repaired.text).zones == parse_facts(RIGHT).zones
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
        "", "A cat.", "middle left lung", "lower lobe of the right lung", "tumour", "left", "lung " * 400,
        "There are as many lesions in the right upper zone as for the left one.", "let it be", "two ant one toe",
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


words = st.lists(st.sampled_from([*sorted(KNOWN), "uppper", "lo", "wer", "leftlung", ",", ".", "polyp", "rightright"]))


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


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("small polyp in the lowr right colon", "small polyp in the lower right colon"),
        ("opacities in the uppper zone", "opacities in the upper zone"),
        ("Bilateral pulmonary infection involving two regions with involvement of the llower left lung and the lower "
         "rihgt lung", "Bilateral pulmonary infection involving two regions with involvement of the lower left lung "
         "and the lower right lung"),
        ("Unilateral pulmonary infection involving one regins affecting the lowerright lung",
         "Unilateral pulmonary infection involving one regions affecting the lower right lung"),
        ("consolidation of the LEFFT LUNG, Midlle zone", "consolidation of the LEFT LUNG, Middle zone"),
        ("streaky shadow in the left left upper zone", "streaky shadow in the left upper zone"),
    ],
)  # fmt: skip
def test_words_of_the_anatomy_are_repaired_in_any_sentence(written: str, meant: str) -> None:
    assert repair_prompt(written).text == meant


REAL_WORDS = """slower might bright flower rights lefty tight light night sight fight eight lift loft felt list lest let
    slower lover loser tower power shower lowers lowest supper uppers upset utter riddle fiddle muddle meddle middles
    long lounge lunge lug lush love lone globe robe ozone ones none once done gone yield fiend filed area are arena aria
    religion legion injection inspection inflection inaction intention affection effected inflected injected infested
    upright alright fright wright cleft theft shift swift bilaterally lateral collateral pulmonic bowl flows"""


def test_other_english_words_are_never_changed() -> None:
    for word in REAL_WORDS.split():
        for text in (word, f"A {word} shadow near the upper left lung", f"{word.upper()} lower right lung"):
            assert repair_prompt(text).text == text


def test_work_on_a_run_together_word_grows_with_its_letters() -> None:
    """The first version tried every way to split: sixty letters never came to an end."""
    shorter = count_lines(lambda: repair_prompt("left lung " + "all" * 10 + "q"), 100_000)
    longer = count_lines(lambda: repair_prompt("left lung " + "all" * 19 + "q"), 100_000)
    assert longer <= 3 * shorter
    for word in ("x" * 60, "areas" * 12, "left" * 15, "l" * 1000, "lowerright" * 5 + "z", "and" * 300):
        count_lines(lambda word=word: repair_prompt("left lung " + word), 100_000)  # type: ignore[misc]


def test_a_run_together_word_is_split_up_to_a_limit() -> None:
    assert respell("lowerleftlung") == "lower left lung"
    assert respell("left" * (LONGEST // 4)) == " ".join(["left"] * (LONGEST // 4))
    assert respell("left" * (LONGEST // 4 + 1)) is None
    assert respell("allone") is None, "no word of the anatomy"


@pytest.mark.parametrize("wordings", [DEV, HELD_OUT])
def test_mistyped_sentences_mean_what_they_meant(wordings: Any) -> None:
    """A letter doubled, dropped, replaced or exchanged in one word of fifty."""
    rng = random.Random(5)
    readable = 0
    for _ in range(600):
        named = make(rng, wordings)
        repaired = repair_prompt(mistype(rng, named.text, 0.02))
        reading = read_prompt(repaired.text)
        readable += reading.complete and set(reading.zones.sites()) == named.sites
        assert not reading.complete or set(reading.zones.sites()) <= named.sites
    assert readable >= 0.96 * 600


def test_repairs_can_be_left_out() -> None:
    (left_out,), (made,) = repair_prompts(["uppper left lung"], repair=False), repair_prompts(["uppper left lung"])
    assert (left_out.text, left_out.repairs) == ("uppper left lung", ())
    assert made.to_dict() == {
        "written": "uppper left lung", "text": "upper left lung", "repairs": [{"found": "uppper", "put": "upper"}],
    }  # fmt: skip


def count_lines(call: Callable[[], object], most: int) -> int:
    """How many lines of Python a call runs; an error as soon as they are more than `most`."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        assert lines <= most, "too many steps"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
