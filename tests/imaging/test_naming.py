"""Names of output files for images of the same file name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cclip_deploy.imaging.naming import file_stem, image_names


def stems(*names: str) -> list[str]:
    """The stems of all images for the prompt "p"."""
    paths, used = [Path(name) for name in names], set[str]()
    found = image_names(paths)
    return [file_stem(path, "p", used, found[path]) for path in paths]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("x/a.png", "x/b.png"), ["a-p", "b-p"]),
        (("x/a.png", "y/a.png"), ["x-a-p", "y-a-p"]),
        (("x/a.png", "y/a.png", "y/b.png"), ["x-a-p", "y-a-p", "b-p"]),
        (("x/a.png", "y/A.jpg"), ["x-a-p", "y-A-p"]),
        (("one/films/a.dcm", "two/films/a.dcm"), ["one-films-a-p", "two-films-a-p"]),
        (("x/a b.png", "y/a-b.png"), ["x-a-b-p", "y-a-b-p"]),
        (("s1/IM1", "s2/IM1", "s2/IM2"), ["s1-IM1-p", "s2-IM1-p", "IM2-p"]),
        (("x/a.png", "y/a.png", "x-a.png"), None),
        (("a.png", "x/a.png"), None),
    ],
)
def test_folders_tell_images_of_one_name_apart(paths: tuple[str, ...], expected: list[str] | None) -> None:
    found = stems(*paths)
    assert len({stem.casefold() for stem in found}) == len(paths)
    assert found == (expected or found)
    assert stems(*paths) == found


def test_names_that_only_their_suffix_tells_apart_get_a_hash() -> None:
    first, second = stems("x/a.png", "x/a.jpg")
    assert first == "a-p"
    assert second.startswith("a-p-")


@given(st.lists(st.lists(st.sampled_from(["a", "b", "a-b", "A", "é", "左"]), min_size=1, max_size=4), max_size=8))
@settings(deadline=None, max_examples=100)
def test_any_folders_give_unique_stems(parts: list[list[str]]) -> None:
    paths = list(dict.fromkeys("/" + "/".join(each) for each in parts))
    found = stems(*paths)
    assert len({stem.casefold() for stem in found}) == len(paths)
