"""Render lung zones as sentences in varied wordings, for synthetic data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cclip_deploy.prompts.template import NUMBERS, SIDES, ZONES, Zones, render

WORDINGS = ("qata", "varied")


def render_varied(zones: Zones, rng: np.random.Generator) -> str:
    """Render a sentence in one of several wordings, chosen by `rng`; raise PromptError if the zones are empty."""
    published = render(zones)
    wording = int(rng.integers(0, len(_SENTENCES) + 1))
    if wording == len(_SENTENCES):
        return published
    phrase, sentence = _SENTENCES[wording]
    named = [(side, _in_order(zones, side)) for side in SIDES if _in_order(zones, side)]
    if rng.random() < 0.5:
        named.reverse()
    extent = "Unilateral" if len(named) == 1 else "Bilateral"
    places = " and ".join(phrase(side, listed) for side, listed in named)
    text = sentence.format(extent=extent, count=NUMBERS[len(named) - 1], places=places)
    return text[0].upper() + text[1:]


def _in_order(zones: Zones, side: str) -> list[str]:
    return [zone for named, zone in zones.sites() if named == side]


def _as_published(side: str, zones: list[str]) -> str:
    return f"the {'whole' if len(zones) == len(ZONES) else ' '.join(zones)} {side} lung"


def _side_first(side: str, zones: list[str]) -> str:
    return f"the {side} {_listed(zones)} {'zone' if len(zones) == 1 else 'zones'}"


def _zone_first(side: str, zones: list[str]) -> str:
    return f"the {_listed(zones)} {'lobe' if len(zones) == 1 else 'lobes'} of the {side} lung"


def _abbreviated(side: str, zones: list[str]) -> str:
    return ", ".join(f"{side[0]}{zone[0]}l".upper() for zone in zones)


def _listed(zones: list[str]) -> str:
    return zones[0] if len(zones) == 1 else f"{', '.join(zones[:-1])} and {zones[-1]}"


_SENTENCES: tuple[tuple[Callable[[str, list[str]], str], str], ...] = (
    (_as_published, "{extent} pulmonary infection involving {count} regions with involvement of {places}"),
    (_as_published, "{extent} pulmonary infection involving {count} regions affecting {places}"),
    (_as_published, "{places}"),
    (_side_first, "Opacity in {places}."),
    (_zone_first, "Consolidation of {places}."),
    (_zone_first, "{extent} infiltrates in {places}"),
    (_abbreviated, "{places} infiltrate"),
)
