"""Tests of subgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.evaluation.subgroups import NONE_NAMED, NOT_UNDERSTOOD, group_order, subgroups_of

TEXT = "Bilateral pulmonary infection, three infected areas, upper left lung and upper middle right lung."


def sample(name: str, text: str) -> Sample:
    return Sample(Path("img") / name, Path("mask.png"), text, "test", name)


def test_template_prompts_are_grouped_by_sides_and_zones() -> None:
    assert subgroups_of(sample("a.png", TEXT), 0.03) == {
        "target size": "1 to 5 %", "side named": "both", "zones named": "3",
    }  # fmt: skip


def test_free_prompts_are_grouped_by_sides_and_zones() -> None:
    text = "Bilateral pulmonary infection involving two regions affecting the left upper zone and both lower lobes"
    assert subgroups_of(sample("a.png", text), 0.03) == {
        "target size": "1 to 5 %", "side named": "both", "zones named": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "side", "zones"),
    [
        ("a polyp", NONE_NAMED, NONE_NAMED),
        ("left-sided consolidation", "left", NONE_NAMED),
        ("left lung and middle right lung", "both", NONE_NAMED),
        ("no infection in the left lung", NOT_UNDERSTOOD, NOT_UNDERSTOOD),
    ],
)
def test_prompts_without_a_side_and_unparsed_prompts_have_own_groups(text: str, side: str, zones: str) -> None:
    assert subgroups_of(sample("a.png", text), 0.2) == {
        "target size": "more than 5 %", "side named": side, "zones named": zones,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "view"),
    [("sub-S1_ses-E1_run-1_bp-chest_vp-ap_dx.png", "ap"), ("patient0001_2CH_ED.png", "2ch"), ("x_4CH.png", "4ch")],
)
def test_the_view_is_read_from_the_file_name(name: str, view: str) -> None:
    assert subgroups_of(sample(name, "heart"), 0.0)["view"] == view


def test_sizes_are_sorted_ascending() -> None:
    names = ["more than 5 %", "empty", "1 to 5 %", "up to 1 % of the picture"]
    assert sorted(names, key=group_order) == ["empty", "up to 1 % of the picture", "1 to 5 %", "more than 5 %"]
    assert sorted(["right", NONE_NAMED, "both", "left"], key=group_order) == ["both", "left", "right", NONE_NAMED]
