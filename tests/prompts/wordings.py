"""Sentences that name lung sites in many wordings, each with the sites it was made from: an oracle for the reader.

Nothing here knows how the reader works: a sentence is made by filling its sites into phrases and its phrases into a
frame. `DEV` wordings were used while the reader was written, `HELD_OUT` ones only to measure it afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ZONES = ("upper", "middle", "lower")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Named:
    """A sentence, the (side, zone) pairs that it names, and its number word's count, if it has one."""

    text: str
    sites: frozenset[tuple[str, str]]
    count: int | None = None


@dataclass(frozen=True)
class Wordings:
    """Phrases for the zones of one side, phrases for the same zones of both, and frames that take a list of phrases."""

    one_side: Sequence[Callable[[random.Random, str, list[str]], str]]
    both_sides: Sequence[Callable[[random.Random, list[str]], str]]
    frames: Sequence[str]
    joints: Sequence[str]
    extents: bool = field(default=True)


def _and(zones: list[str]) -> str:
    return zones[0] if len(zones) == 1 else f"{', '.join(zones[:-1])} and {zones[-1]}"


def _plural(rng: random.Random, zones: list[str], nouns: Sequence[str]) -> str:
    return rng.choice(nouns) + ("s" if len(zones) > 1 else "")


def _all_or(zones: list[str], words: str, whole: str) -> str:
    return whole if len(zones) == 3 else words


PLACES = ("zone", "lobe", "field", "region", "area")

DEV = Wordings(
    one_side=(
        lambda rng, side, zones: f"{_all_or(zones, ' '.join(zones), 'all')} {side} lung",
        lambda rng, side, zones: f"the {_all_or(zones, ' '.join(zones), 'all')} {side} lung",
        lambda rng, side, zones: f"the {_all_or(zones, _and(zones), 'entire')} {side} lung",
        lambda rng, side, zones: f"the {side} {_and(zones)} {_plural(rng, zones, PLACES)}",
        lambda rng, side, zones: f"{side} {_and(zones)} lung {_plural(rng, zones, PLACES)}",
        lambda rng, side, zones: f"the {_and(zones)} {_plural(rng, zones, PLACES)} of the {side} lung",
        lambda rng, side, zones: ", ".join(f"{side[0]}{zone[0]}l".upper() for zone in zones),
        lambda rng, side, zones: ", ".join(f"{zone} {side} lung" for zone in zones),
    ),
    both_sides=(
        lambda rng, zones: f"both {_and(zones)} lobes",
        lambda rng, zones: f"bilateral {_and(zones)} zones",
        lambda rng, zones: f"the {_and(zones)} {_plural(rng, zones, PLACES)} of both lungs",
    ),
    frames=(
        "{extent} pulmonary infection, {count} infected areas, {sites}.",
        "{extent} pulmonary infection involving {count} regions with involvement of {sites}",
        "{extent} pulmonary infection involving {count} regions affecting {sites}",
        "{sites}",
        "Opacity in {sites}.",
        "consolidation of {sites}",
        "Infection of {sites}",
    ),
    joints=(" and ", ", ", " and the "),
)

HELD_OUT = Wordings(
    one_side=(
        lambda rng, side, zones: f"the {side} lung ({', '.join(zones)})",
        lambda rng, side, zones: f"{side} lung: {_and(zones)} {_plural(rng, zones, PLACES)}",
        lambda rng, side, zones: f"{side}-sided {_and(zones)} {_plural(rng, zones, PLACES)}",
        lambda rng, side, zones: f"the {'-'.join(zones)} {_plural(rng, zones, PLACES)} on the {side}",
        lambda rng, side, zones: f"{side} {'/'.join(zones)} {_plural(rng, zones, PLACES)}",
        lambda rng, side, zones: f"{_all_or(zones, _and(zones) + ' portions of', 'the whole of')} the {side} lung",
        lambda rng, side, zones: f"{_and([z.replace('middle', 'mid') for z in zones])} {side} hemithorax",
        lambda rng, side, zones: " and ".join(f"the {zone} part of the {side} lung" for zone in zones),
        lambda rng, side, zones: "/".join(f"{side[0]}{zone[0]}z".upper() for zone in zones),
        lambda rng, side, zones: f"the {side} lung, {_and(zones)} third{'s' if len(zones) > 1 else ''}",
    ),
    both_sides=(
        lambda rng, zones: f"{_and(zones)} lung fields bilaterally",
        lambda rng, zones: f"the left and right {_and(zones)} lobes",
        lambda rng, zones: f"{_and(zones)} zones on both sides",
        lambda rng, zones: f"{_and(zones)} parts of the left and right lungs",
    ),
    frames=(
        "There is patchy airspace disease in {sites}.",
        "{sites} are affected by infection",
        "Findings: {sites}",
        "Segment the infected regions in {sites}",
        "Infiltrates noted within {sites}, consistent with COVID-19",
        "{extent} pneumonia in {count} lung regions, namely {sites}.",
        "Ground-glass opacities located in {sites}; heart size normal-looking",
        "pulmonary infection with {count} affected sites: {sites}",
        "Hazy shadowing seen at {sites}",
    ),
    joints=("; ", " as well as ", " plus ", ", and ", " & "),
)


def make(rng: random.Random, wordings: Wordings) -> Named:
    """A sentence for one to six random sites."""
    sites = frozenset(rng.sample([(s, z) for s in ("left", "right") for z in ZONES], rng.randint(1, 6)))
    zones = {side: [zone for zone in ZONES if (side, zone) in sites] for side in ("left", "right")}
    if zones["left"] == zones["right"] and rng.random() < 0.5:
        phrases = [rng.choice(wordings.both_sides)(rng, zones["left"])]
    else:
        sides = [side for side in rng.sample(["left", "right"], 2) if zones[side]]
        phrase = rng.choice(wordings.one_side)
        mixed = rng.random() < 0.2
        phrases = [(rng.choice(wordings.one_side) if mixed else phrase)(rng, side, zones[side]) for side in sides]
    frame, count = rng.choice(wordings.frames), rng.randint(1, 6)
    joint = rng.choice(wordings.joints)
    if joint.endswith("the ") and any(phrase.startswith("the ") for phrase in phrases):
        joint = " and "
    extent = "Bilateral" if zones["left"] and zones["right"] else "Unilateral"
    text = frame.format(extent=extent, count=NUMBERS[count], sites=joint.join(phrases))
    case = rng.random()
    text = text.upper() if case < 0.05 else text.lower() if case < 0.1 else text[0].upper() + text[1:]
    return Named(text, sites, count if "{count}" in frame else None)


def mistype(rng: random.Random, text: str, share: float) -> str:
    """The text with one letter doubled, dropped, replaced or exchanged with the next in a share of its long words."""
    return "".join(
        _mistype_word(rng, part) if len(part) >= 4 and part.isalpha() and rng.random() < share else part
        for part in _words_and_gaps(text)
    )


def _words_and_gaps(text: str) -> list[str]:
    parts: list[str] = []
    for letter in text:
        if parts and parts[-1][-1].isalpha() and letter.isalpha():
            parts[-1] += letter
        else:
            parts.append(letter)
    return parts


def _mistype_word(rng: random.Random, word: str) -> str:
    at = rng.randrange(len(word) - 1)
    kind = rng.choice(("double", "drop", "replace", "exchange"))
    if kind == "double":
        return word[: at + 1] + word[at:]
    if kind == "drop":
        return word[: at + 1] + word[at + 2 :]
    if kind == "replace":
        return word[: at + 1] + rng.choice("aeioustnrl") + word[at + 2 :]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
