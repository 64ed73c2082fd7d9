"""Parsing and rendering prompts in the form of QaTa-COV19."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cclip_deploy.errors import PromptError
from cclip_deploy.prompts.template import (
    EXAMPLE,
    SITES,
    ZONES,
    Facts,
    Zones,
    parse_facts,
    parse_or_none,
    render,
)

zone_sets = st.frozensets(st.sampled_from(ZONES))
named_zones = st.builds(Zones, left=zone_sets, right=zone_sets).filter(lambda zones: bool(zones.sites()))


@given(named_zones)
def test_parse_reads_back_what_render_wrote(zones: Zones) -> None:
    assert parse_facts(render(zones)).zones == zones


@given(named_zones, st.integers(1, 12))
def test_parse_reads_back_zones_and_count(zones: Zones, count: int) -> None:
    assert parse_facts(render(zones, count)) == Facts(zones, count)


def test_a_count_without_a_number_word_is_refused() -> None:
    for count in (0, 13):
        with pytest.raises(PromptError, match="Use 1 to 12"):
            render(Zones(left=frozenset({"upper"})), count)


def test_free_text_has_no_facts() -> None:
    assert parse_or_none("A cat.") is None


@pytest.mark.parametrize(
    ("left", "right", "sentence"),
    [
        ("lower", "upper", EXAMPLE),
        ("", "middle", "Unilateral pulmonary infection, one infected area, middle right lung."),
        ("lower upper", "", "Unilateral pulmonary infection, one infected area, upper lower left lung."),
        (
            "upper middle lower",
            "lower middle",
            "Bilateral pulmonary infection, two infected areas, all left lung and middle lower right lung.",
        ),
    ],
)
def test_render_writes_the_published_form(left: str, right: str, sentence: str) -> None:
    assert render(Zones(frozenset(left.split()), frozenset(right.split()))) == sentence


def test_parse_does_not_mind_case_spaces_order_and_number_word() -> None:
    text = "  BILATERAL pulmonary  infection, three infected areas, upper right lung and middle lower left lung"
    assert parse_facts(text).zones == Zones(frozenset({"middle", "lower"}), frozenset({"upper"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat.", "does not have the form"),
        ("Unilateral pulmonary infection, one infected area, .", "does not have the form"),
        ("Unilateral pulmonary infection, one infected area, uppper left lung.", "'uppper'"),
        ("Unilateral pulmonary infection, one infected area, upper left.", "'upper left'"),
        ("Bilateral pulmonary infection, two infected areas, upper left lung and lower left lung.", "left lung twice"),
        ("Bilateral pulmonary infection, one infected area, upper left lung.", "are unilateral"),
        ("Unilateral pulmonary infection, one infected area, all upper left lung.", "'all'"),
    ],
)
def test_parse_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        parse_facts(text)


def test_no_zones_have_no_sentence() -> None:
    with pytest.raises(PromptError, match="at least one zone"):
        render(Zones())


def test_unknown_zones_and_sides_are_refused() -> None:
    with pytest.raises(PromptError, match="'top'"):
        Zones(left=frozenset({"top"}))
    with pytest.raises(PromptError, match="'centre'"):
        Zones.of_sites([("centre", "upper")])


@given(st.sets(st.sampled_from(SITES)))
def test_sites_and_zones_are_the_same_thing(sites: set[tuple[str, str]]) -> None:
    assert set(Zones.of_sites(sites).sites()) == sites
