"""Groups of a data set's rows that are reported apart: what the sentence names, how large the target is, the view."""

from __future__ import annotations

import re

from cclip_deploy.datasets.sample import Sample
from cclip_deploy.prompts.reader import read_prompt

VIEW = re.compile(r"_vp-([a-z0-9]+)|_([24]CH)(?:_|\.)", re.IGNORECASE)
"""How QaTa-COV19 (after BIDS) and CAMUS write the view into a file's name."""
NONE_NAMED, NOT_UNDERSTOOD = "none named", "not understood"
WAYS = ("target size", "side named", "zones named", "view")
SIZES = ((0.0, "empty"), (0.01, "up to 1 % of the picture"), (0.05, "1 to 5 %"), (1.0, "more than 5 %"))


def groups_of(sample: Sample, reference_share: float) -> dict[str, str]:
    """The group of one row in every way of grouping.

    A sentence that was not understood has a group of its own, and so has one that names no side, or sides without
    zones; the view is left out where the image's name does not tell it.

    `reference_share` is the reference mask's share of the picture, in [0, 1].
    """
    found = {"target size": next(name for limit, name in SIZES if reference_share <= limit)}
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


def order(group: str) -> tuple[int, str]:
    """Sizes from small to large, other groups by their name, those that are unknown last."""
    names = [name for _, name in SIZES]
    return (names.index(group) if group in names else len(names) + (group in (NONE_NAMED, NOT_UNDERSTOOD))), group
