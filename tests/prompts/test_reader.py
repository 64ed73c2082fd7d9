"""Reading prompts in many wordings, prompts that are not understood, and mirrored prompts."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cclip_deploy.prompts.reader import meaning, mirror, read_prompt, swap_sides
from cclip_deploy.prompts.template import ZONES, Zones, parse_facts, render
from tests.prompts.wordings import DEV, HELD_OUT, Named, Wordings, make

zone_sets = st.frozensets(st.sampled_from(ZONES))
named_zones = st.builds(Zones, left=zone_sets, right=zone_sets).filter(lambda zones: bool(zones.sites()))
OTHER = {"left": "right", "right": "left"}
FORM = "{extent} pulmonary infection involving {count} regions {verb} {areas}"


def sentences(wordings: Wordings, count: int = 1500) -> list[Named]:
    rng = random.Random(11)
    return [make(rng, wordings) for _ in range(count)]


@pytest.mark.parametrize("wordings", [DEV, HELD_OUT])
def test_sites_are_read_from_any_wording(wordings: Wordings) -> None:
    """HELD_OUT was written before the reader and first run after it: 99.6 % then, all since brackets close a list."""
    made = sentences(wordings)
    readings = [read_prompt(named.text) for named in made]
    right = [r.complete and set(r.zones.sites()) == n.sites for r, n in zip(readings, made, strict=True)]
    assert sum(right) >= 0.98 * len(made)
    assert all(set(r.zones.sites()) == n.sites for r, n in zip(readings, made, strict=True) if r.complete)
    counted = [(r.count, n.count) for r, n in zip(readings, made, strict=True) if r.understood and n.count]
    assert all(read == said for read, said in counted)


@pytest.mark.parametrize("wordings", [DEV, HELD_OUT])
def test_a_mirrored_sentence_names_the_other_sides_of_the_same_zones(wordings: Wordings) -> None:
    for named in sentences(wordings, 400):
        flipped = mirror(named.text)
        if flipped is not None:
            assert set(read_prompt(flipped).zones.sites()) == {(OTHER[side], zone) for side, zone in named.sites}
            assert mirror(flipped) in (named.text, None) or meaning(str(mirror(flipped))) == meaning(named.text)


@pytest.mark.parametrize(
    ("text", "sites"),
    [
        ("lower left lung", "L lower"),
        ("opacity in the right upper zone", "R upper"),
        ("both lower lobes", "L lower, R lower"),
        ("RLL infiltrate", "R lower"),
        ("entire left lung", "L upper, L middle, L lower"),
        ("the right upper and middle zones", "R upper, R middle"),
        ("all right lung and all left lung", "L upper, L middle, L lower, R upper, R middle, R lower"),
        ("left lower and upper right lung", "L lower, R upper"),
        ("upper left and right lower lung", "L upper, R lower"),
        ("both the upper and lower zones of the left lung", "L upper, L lower"),
        ("bilateral upper, left lower", "L upper, L lower, R upper"),
        ("bibasilar opacities", "L lower, R lower"),
        ("from the upper to the lower zone of the left lung", "L upper, L middle, L lower"),
        ("mid-to-lower left lung", "L middle, L lower"),
        ("Left lung: upper, middle; right lung: lower", "L upper, L middle, R lower"),
        ("No pleural effusion. Opacity in the left lower lobe", "L lower"),
        (
            "BILATERAL PULMONARY INFECTION, TWO INFECTED AREAS, LOWER LEFT LUNG AND UPPER RIGHT LUNG.",
            "L lower, R upper",
        ),
        ("lowr leff lung", "L lower"),
    ],
)
def test_sites_of_free_text(text: str, sites: str) -> None:
    named = {({"L": "left", "R": "right"}[site[0]], site[2:]) for site in sites.split(", ")}
    reading = read_prompt(text)
    assert reading.complete
    assert set(reading.zones.sites()) == named


@pytest.mark.parametrize(
    ("text", "side", "unsided"),
    [
        ("left-sided consolidation", "left", set()), ("bilateral", "both", set()), ("left lung", "left", set()),
        ("left lung and middle right lung", "both", set()), ("opacity in the upper zone", "none", {"upper"}),
        ("a bright polyp", "none", set()), ("", "none", set()),
    ],
)  # fmt: skip
def test_what_names_a_side_or_a_zone_alone_is_understood_but_names_no_sites(
    text: str, side: str, unsided: set[str]
) -> None:
    reading = read_prompt(text)
    assert (reading.understood, reading.complete, reading.side) == (True, False, side)
    assert reading.unsided_zones == unsided


@pytest.mark.parametrize(
    "text",
    [
        "no infection in the left lung", "lower left lung without the upper zone", "all but the left lower lobe",
        "left greater than right opacities", "upper or middle left lung", "clear right upper zone",
        "leftmost nodule", "R marker", "dextrocardia", "lesion at 3 o'clock", "the lingula", "left ventricle",
        "polyp on the left wall", "upper abdomen and left lung", "lower left and right lungs",
        "upper zone opacity and left effusion", "consolidation of the lift lung", "middle zones on bot sides",
        "upper xeft lung", "left lung " * 101, "left upper, " * 41,
    ],
)  # fmt: skip
def test_what_cannot_be_read_for_sure_is_not_understood_and_not_flipped(text: str) -> None:
    reading = read_prompt(text)
    assert reading.not_understood
    assert (reading.complete, reading.sides, reading.zones) == (False, frozenset(), Zones())
    assert mirror(text) is None


@given(named_zones, st.integers(1, 12))
def test_a_mirrored_sentence_of_the_form_keeps_its_form(zones: Zones, count: int) -> None:
    assert mirror(render(zones, count)) == render(zones.mirrored(), count)
    assert read_prompt(render(zones, count)).zones == zones
    assert read_prompt(render(zones, count)).count == count


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("nodule in the RUL", "nodule in the LUL"),
        ("RIGHT lower zone, Left upper zone", "LEFT lower zone, Right upper zone"),
        ("L lower zone", "R lower zone"),
        ("bright, upright shadow", "bright, upright shadow"),
        ("both lower lobes", "both lower lobes"),
        ("a polyp in the colon", "a polyp in the colon"),
    ],
)
def test_words_for_sides_change_places(text: str, mirrored: str) -> None:
    assert mirror(text) == mirrored


@given(named_zones)
def test_swapped_sides_name_the_mirrored_zones(zones: Zones) -> None:
    assert parse_facts(swap_sides(render(zones))).zones == zones.mirrored()


@given(
    st.lists(st.sampled_from(["left", "Right", "LEFT", "lung", "bright", "-", "RUL", "l", "lull", "R"])).map(" ".join)
)
def test_swapping_twice_gives_the_text_back(text: str) -> None:
    assert swap_sides(swap_sides(text)) == text


def test_swap_keeps_case_and_leaves_other_words() -> None:
    assert swap_sides("LEFT Left left bright leftover") == "RIGHT Right right bright leftover"


def test_sentences_that_name_the_same_sites_have_one_meaning() -> None:
    right = "Unilateral pulmonary infection, {} infected areas, middle lower right lung."
    assert meaning(right.format("two")) == meaning(right.format("one")) == meaning("RML, RLL")
    assert meaning("middle right lung") != meaning("RML, RLL")
    assert meaning("A polyp. ") == meaning("a polyp") != meaning("a tumour")


SOME_WORDS = "left right lung upper lower zones and , ; ( ) both all RUL of the no"


@given(st.lists(st.sampled_from(SOME_WORDS.split())))
def test_any_sequence_of_words_is_read_in_bounded_work(sequence: list[str]) -> None:
    steps = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        read_prompt(" ".join(sequence))
    finally:
        sys.settrace(before)
    assert steps < 2_000 + 500 * len(sequence) ** 2


@given(st.text())
def test_any_text_is_read_or_not_understood(text: str) -> None:
    reading = read_prompt(text)
    assert reading.understood or not reading.complete
