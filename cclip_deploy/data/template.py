"""The prompt form of QaTa-COV19: which zones of which lung a sentence names, and the sentence for given zones."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

from cclip_deploy.errors import PromptError

ZONES = ("upper", "middle", "lower")
SIDES = ("left", "right")
SITES: tuple[tuple[str, str], ...] = tuple(product(SIDES, ZONES))
"""All six (side, zone) pairs, in the order in which a prompt names them."""

NUMBERS = ("one", "two", "three", "four", "five", "six")
EXAMPLE = "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung."
SENTENCE = re.compile(
    rf"(?P<extent>unilateral|bilateral) pulmonary infection, (?:{'|'.join(NUMBERS)}) infected areas?, (?P<areas>.+)"
)
AREA = re.compile(r"(?P<zones>.+) (?P<side>left|right) lung")


@dataclass(frozen=True)
class Zones:
    """Zones of the patient's own left and right lung; the right lung is on the image's left."""

    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for zone in sorted(self.left | self.right):
            if zone not in ZONES:
                raise PromptError(f"Unknown lung zone {zone!r}. Use {', '.join(ZONES)}.")

    @staticmethod
    def of_sites(sites: Collection[tuple[str, str]]) -> Zones:
        """The zones of (side, zone) pairs, such as ("left", "upper")."""
        for side, _ in sites:
            if side not in SIDES:
                raise PromptError(f"Unknown side {side!r}. Use left or right.")
        return Zones(*(frozenset(zone for s, zone in sites if s == side) for side in SIDES))

    def sites(self) -> tuple[tuple[str, str], ...]:
        """The (side, zone) pairs in the order of `SITES`."""
        return tuple(site for site in SITES if site[1] in (self.left if site[0] == "left" else self.right))

    def mirrored(self) -> Zones:
        """What these zones become when the picture is flipped left to right."""
        return Zones(left=self.right, right=self.left)


def render(zones: Zones) -> str:
    """The sentence for `zones`, left lung first; PromptError if they are empty (the form has no word for none).

    The number word counts lungs named, not zones, as QaTa-COV19 does.
    """
    areas = [
        f"{_list_zones(named)} {side} lung"
        for side, named in zip(SIDES, (zones.left, zones.right), strict=True)
        if named
    ]
    if not areas:
        raise PromptError("There is no prompt for no zones at all. Name at least one zone of one lung.")
    extent, number = ("Unilateral", "one infected area") if len(areas) == 1 else ("Bilateral", "two infected areas")
    return f"{extent} pulmonary infection, {number}, {' and '.join(areas)}."


def parse(text: str) -> Zones:
    """The zones that a sentence names; either lung may come first, case, spacing and the final stop do not matter.

    The number word is not compared: real reports count areas in more than one way.

    Raises:
        PromptError: the text is not of the form, names a lung twice, or its first word contradicts the lungs named.
    """
    sentence = SENTENCE.fullmatch(" ".join(text.lower().split()).removesuffix("."))
    if sentence is None:
        raise PromptError(f"Prompt {text!r} is not of the form of QaTa-COV19. An example: {EXAMPLE!r}.")
    named: dict[str, frozenset[str]] = {}
    for phrase in sentence["areas"].split(" and "):
        area = AREA.fullmatch(phrase.strip())
        if area is None:
            raise PromptError(
                f"{phrase.strip()!r} in prompt {text!r} is not '<zones> left lung' or '<zones> right lung'."
            )
        if area["side"] in named:
            raise PromptError(f"Prompt {text!r} names the {area['side']} lung twice. Name each lung once.")
        named[area["side"]] = _read_zones(area["zones"], text)
    expected = "bilateral" if len(named) == 2 else "unilateral"
    if sentence["extent"] != expected:
        raise PromptError(f"Prompt {text!r} says {sentence['extent']}, but the lungs that it names make it {expected}.")
    return Zones(**named)


def swap_sides(text: str) -> str:
    """Any text with the words left and right exchanged, for a picture that was flipped left to right.

    Nothing else changes, so the lungs of a QaTa-COV19 prompt come in the other order;
    `render(parse(text).mirrored())` keeps the order.
    """
    return re.sub(r"\b(left|right)\b", lambda found: _other_side(found[0]), text, flags=re.IGNORECASE)


def _list_zones(named: frozenset[str]) -> str:
    return "all" if named == frozenset(ZONES) else " ".join(zone for zone in ZONES if zone in named)


def _read_zones(words: str, text: str) -> frozenset[str]:
    if words == "all":
        return frozenset(ZONES)
    zones = words.split()
    for zone in zones:
        if zone not in ZONES:
            raise PromptError(f"Unknown lung zone {zone!r} in prompt {text!r}. Use {', '.join(ZONES)}, or all.")
    return frozenset(zones)


def _other_side(word: str) -> str:
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
