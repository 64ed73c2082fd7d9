"""Groups of a data set's rows that are reported apart: what the sentence names, how large the target is, the view."""

from __future__ import annotations

import re

from cclip_deploy.data.layouts import Referral
from cclip_deploy.data.template import parse_or_none

VIEW = re.compile(r"_vp-([a-z0-9]+)|_([24]CH)(?:_|\.)", re.IGNORECASE)
"""How QaTa-COV19 (after BIDS) and CAMUS write the view into a file's name."""
SIZES = ((0.0, "empty"), (0.01, "up to 1 % of the picture"), (0.05, "1 to 5 %"), (1.0, "more than 5 %"))


def groups_of(referral: Referral, reference_share: float) -> dict[str, str]:
    """The group of one row in every way of grouping; one that cannot be known is left out.

    `reference_share` is the reference mask's share of the picture, in [0, 1].
    """
    found = {"target size": next(name for limit, name in SIZES if reference_share <= limit)}
    facts = parse_or_none(referral.text)
    if facts is not None:
        found |= {"side named": facts.side, "zones named": str(facts.zone_count)}
    view = VIEW.search(referral.image.name)
    if view is not None:
        found["view"] = (view[1] or view[2]).lower()
    return found


def order(group: str) -> tuple[int, str]:
    """Sizes from small to large, other groups by their name."""
    names = [name for _, name in SIZES]
    return (names.index(group) if group in names else len(names)), group
