"""Subgroups of rows that are reported separately: by target size, side and zones named in the prompt, and view."""

from __future__ import annotations

import re

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.prompts.reader import read_prompt

VIEW = re.compile(r"_vp-([a-z0-9]+)|_([24]CH)(?:_|\.)", re.IGNORECASE)
"""The view in file names of QaTa-COV19 (BIDS) and CAMUS."""
NONE_NAMED, NOT_UNDERSTOOD = "none named", "not understood"
GROUPINGS = ("target size", "side named", "zones named", "view")
SIZES = ((0.0, "empty"), (0.01, "up to 1 % of the picture"), (0.05, "1 to 5 %"), (1.0, "more than 5 %"))


def subgroups_of(sample: Sample, reference_fraction: float) -> dict[str, str]:
    """Return the group of a row in every grouping.

    Prompts that could not be parsed, name no side, or name sides without zones have their own groups. "view" is left
    out if the file name does not contain it. `reference_fraction` is the reference mask's fraction of the image, in
    [0, 1].
    """
    found = {"target size": next(name for limit, name in SIZES if reference_fraction <= limit)}
    reading = read_prompt(sample.text)
    if reading.understood:
        zones = str(len(reading.zones.sites())) if reading.complete else NONE_NAMED
        found |= {"side named": reading.side if reading.sides else NONE_NAMED, "zones named": zones}
    else:
        found |= {"side named": NOT_UNDERSTOOD, "zones named": NOT_UNDERSTOOD}
    view = VIEW.search(sample.image.name)
    if view is not None:
        found["view"] = (view[1] or view[2]).lower()
    return found


def group_order(group: str) -> tuple[int, str]:
    """Sort key of a group: sizes ascending, other groups by name, unknown ones last."""
    names = [name for _, name in SIZES]
    return (names.index(group) if group in names else len(names) + (group in (NONE_NAMED, NOT_UNDERSTOOD))), group
