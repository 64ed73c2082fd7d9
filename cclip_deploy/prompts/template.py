"""Parse and render prompts in the sentence form of QaTa-COV19."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

from cclip_deploy.errors import PromptError

ZONES = ("upper", "middle", "lower")
SIDES = ("left", "right")
SITES: tuple[tuple[str, str], ...] = tuple(product(SIDES, ZONES))
"""All six (side, zone) pairs, in the order of a prompt."""

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
EXAMPLE = "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung."
SENTENCE = re.compile(
    rf"(?P<extent>unilateral|bilateral) pulmonary infection, (?P<number>{'|'.join(NUMBERS)}) infected areas?, "
    r"(?P<areas>.+)"
)
AREA = re.compile(r"(?P<zones>.+) (?P<side>left|right) lung")


@dataclass(frozen=True)
class Zones:
    """Zones of the patient's left and right lung; the right lung is on the left of the image."""

    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for zone in sorted(self.left | self.right):
            if zone not in ZONES:
                raise PromptError(f"Unknown lung zone {zone!r}. Use {', '.join(ZONES)}.")

    @staticmethod
    def of_sites(sites: Collection[tuple[str, str]]) -> Zones:
        """Build from (side, zone) pairs such as ("left", "upper")."""
        for side, _ in sites:
            if side not in SIDES:
                raise PromptError(f"Unknown side {side!r}. Use left or right.")
        return Zones(*(frozenset(zone for s, zone in sites if s == side) for side in SIDES))

    def sites(self) -> tuple[tuple[str, str], ...]:
        """Return the (side, zone) pairs in the order of SITES."""
        return tuple(site for site in SITES if site[1] in (self.left if site[0] == "left" else self.right))

    def mirrored(self) -> Zones:
        """Return the zones after a horizontal flip of the image."""
        return Zones(left=self.right, right=self.left)


@dataclass(frozen=True)
class Facts:
    """Content of a sentence: the zones, and the number of infected areas that the sentence states."""

    zones: Zones
    count: int


def render(zones: Zones, count: int | None = None) -> str:
    """Render the sentence for `zones`, left lung first.

    Args:
        zones: at least one zone.
        count: number of infected areas, 1 to 12; default: the number of lungs named, as in QaTa-COV19.

    Raises:
        PromptError: `zones` is empty or `count` is out of range.
    """
    areas = [
        f"{_list_zones(named)} {side} lung"
        for side, named in zip(SIDES, (zones.left, zones.right), strict=True)
        if named
    ]
    if not areas:
        raise PromptError("A prompt needs at least one zone of one lung.")
    count = len(areas) if count is None else count
    if not 1 <= count <= len(NUMBERS):
        raise PromptError(f"There is no number word for {count} infected areas. Use 1 to {len(NUMBERS)}.")
    extent = "Unilateral" if len(areas) == 1 else "Bilateral"
    noun = "area" if count == 1 else "areas"
    return f"{extent} pulmonary infection, {NUMBERS[count - 1]} infected {noun}, {' and '.join(areas)}."


def parse_facts(text: str) -> Facts:
    """Parse a sentence; the order of the lungs, case, spacing and the final full stop do not matter.

    The number word is not checked against the zones, because published tables count areas in different ways.

    Raises:
        PromptError: the text does not have the form, names a lung twice, or its first word contradicts the lungs named.
    """
    sentence = SENTENCE.fullmatch(" ".join(text.lower().split()).removesuffix("."))
    if sentence is None:
        raise PromptError(f"Prompt {text!r} does not have the form of QaTa-COV19. Example: {EXAMPLE!r}.")
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
        raise PromptError(f"Prompt {text!r} says {sentence['extent']}, but the lungs that it names are {expected}.")
    return Facts(Zones(**named), NUMBERS.index(sentence["number"]) + 1)


def parse_or_none(text: str) -> Facts | None:
    """Parse a sentence, or return None if it does not have the form."""
    try:
        return parse_facts(text)
    except PromptError:
        return None


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
