"""Find the sides and zones of the lungs that a prompt names, in any common wording.

A sentence becomes a sequence of sides and zones with the words between them. A zone belongs to a neighboring side,
before or after it, if only certain words stand between them. The reading that leaves the fewest sides and zones
unassigned is used. If there are several such readings, or the sentence negates or contrasts something, it is not
understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from cclip_deploy.prompts import words
from cclip_deploy.prompts.template import NUMBERS, SIDES, ZONES, Zones, parse_or_none, render
from cclip_deploy.prompts.words import Token, tokenize

LONGEST_TEXT = 1000
"""Longer texts, in characters, are not read."""
MOST_ITEMS = 40
"""Texts with more sides and zones are not read."""
SIDE_ALONE, ZONE_ALONE, ACROSS_COMMA, LIST_THROUGH_NOUN, SHARED_ZONE = 4, 6, 1, 1, 4
"""Costs of a reading, for example for a side without a zone."""

_SWAPPED = {"left": "right", "l": "r", "lt": "rt"}
_SWAPPED |= {other: word for word, other in _SWAPPED.items()}
_SIDE_WORD = re.compile(r"(?<![^\W_])(left|right|lt|rt|l|r)(?=[uml][lz]s?\b|[\W\d_]|$)", re.IGNORECASE)

_ZONES_LISTED = re.compile(r"[Nf]*[,&]*[of]*")
_ZONE_THEN_SIDE = re.compile(r"[NFUf]*[of]*|[Nf]*,[of]*")
_SIDE_THEN_ZONE = re.compile(r"[NFUfo]*,?[Nfo]*")
_SIDES_LISTED = re.compile(r"f*&[of]*|N&of*")
_COUNT = re.compile(r"(?<!A)(?<!Af)D(?=[fFD]*[NF])")
_CORRELATIVE = re.compile(r"B(?=f*S|f*Z(?:[&,f]*Z)*N?[of]*S)")
_QUANTIFIED = re.compile(r"A(?=[foD]*(?:[SBN,;)]|$))")
_SIDED_UNKNOWN = re.compile(r"[SBZX]U")


@dataclass(frozen=True)
class Reading:
    """Places in the lungs that a sentence names.

    Attributes:
        zones: sites named with side and zone.
        sides: sides named, with or without a zone.
        unsided_zones: zones named in a sentence without any side.
        count: number of regions, areas or lesions that the sentence states; None if it states none or several.
        not_understood: words or reasons why the sentence is not understood; the other fields are then empty.
    """

    zones: Zones
    sides: frozenset[str]
    unsided_zones: frozenset[str]
    count: int | None
    not_understood: tuple[str, ...]

    @property
    def understood(self) -> bool:
        """Whether the sentence is understood; it may name no place."""
        return not self.not_understood

    @property
    def complete(self) -> bool:
        """Whether the sentence is understood, names at least one side, and a zone of every side that it names."""
        with_zone = {side for side, _ in self.zones.sites()}
        return self.understood and bool(self.sides) and with_zone == self.sides

    @property
    def side(self) -> str:
        """left, right, both or none."""
        return "both" if len(self.sides) == 2 else next(iter(self.sides), "none")


@dataclass(frozen=True)
class _Item:
    """A side (only `sides`), a zone (only `zones`) or a site (both)."""

    sides: frozenset[str]
    zones: frozenset[str]


@dataclass(frozen=True)
class _Phrase:
    """Consecutive items that belong together."""

    length: int
    cost: int
    sites: frozenset[tuple[str, str]]


def read_prompt(text: str) -> Reading:
    """Read a sentence, with spelling errors corrected."""
    if len(text) > LONGEST_TEXT:
        return _unread(f"longer than {LONGEST_TEXT} characters")
    tokens = tokenize(text)
    kinds = _classify("".join(token.kind for token in tokens))
    tokens = [Token(kind, token.text, token.value) for kind, token in zip(kinds, tokens, strict=True)]
    unclear = _unclear_words(tokens, kinds)
    items, gaps = _items(tokens)
    if unclear or len(items) > MOST_ITEMS:
        return _unread(*unclear or (f"more than {MOST_ITEMS} sides and zones",))
    sides = frozenset[str]().union(*(item.sides for item in items))
    count = _read_count(tokens, kinds)
    if not sides:
        unsided = frozenset[str]().union(*(item.zones for item in items))
        return Reading(Zones(), sides, unsided, count, ())
    readings = _best_readings(items, gaps)
    if len(readings) > 1:
        return _unread("which zone belongs to which side")
    (sites,) = readings
    if sites is None:
        return _unread("a zone without a side")
    return Reading(Zones.of_sites(sites), sides, frozenset(), count, ())


def mirror(text: str) -> str | None:
    """Return the text for a horizontally flipped image, or None if the text is not understood.

    A sentence of QaTa-COV19's form is rendered again, with the left lung first and the same number word. In any other
    text, the words for left and right are exchanged, and the result is read again: it must name the mirrored sites.
    """
    facts = parse_or_none(text)
    if facts is not None:
        return render(facts.zones.mirrored(), facts.count)
    reading = read_prompt(text)
    if not reading.understood:
        return None
    if not reading.sides:
        return text
    swapped = swap_sides(text)
    again = read_prompt(swapped)
    same = again.understood and again.zones == reading.zones.mirrored()
    return swapped if same and again.sides == {_SWAPPED[side] for side in reading.sides} else None


def swap_sides(text: str) -> str:
    """Exchange left and right, L and R, RUL and LUL and the like in a text."""
    return _SIDE_WORD.sub(lambda found: _other_side(found[0]), text)


def meaning(text: str) -> object:
    """Return a key that is equal for sentences that name the same sites, or have the same words."""
    reading = read_prompt(text)
    return reading.zones.sites() if reading.complete else " ".join(text.lower().split()).rstrip(".")


def _other_side(word: str) -> str:
    other = _SWAPPED[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def _unread(*reasons: str) -> Reading:
    return Reading(Zones(), frozenset(), frozenset(), None, reasons)


def _classify(kinds: str) -> str:
    """Resolve kinds that depend on context: whether "all" and "both" name places or are fillers.

    "Bilateral" names both sides if the sentence names no other side, or before a zone; otherwise it is a filler.
    """
    filler, both = words.FILLER, words.BOTH
    if re.search(f"[{words.SIDE}{words.SITE}]", kinds):
        kinds = re.sub(r"E(?!f*Z)", filler, kinds)
    kinds = kinds.replace(words.EXTENT, both)
    kinds = _CORRELATIVE.sub(filler, kinds)
    kinds = _QUANTIFIED.sub("a", kinds).replace(words.ALL, filler)
    return kinds.replace("a", words.ALL)


def _unclear_words(tokens: Sequence[Token], kinds: str) -> list[str]:
    """Return negating, contrasting or ambiguous words in clauses that name a place, and unknown words after a place."""
    unclear = [f"{tokens[at].text} {tokens[at + 1].text}" for at in (m.start() for m in _SIDED_UNKNOWN.finditer(kinds))]
    start = 0
    for clause in kinds.split(words.STOP):
        places = any(kind in clause for kind in (words.SIDE, words.BOTH, words.ZONE, words.ALL, words.SITE))
        for token in tokens[start : start + len(clause)]:
            hidden = token.kind == words.UNCLEAR and token.text not in words.DENIALS
            if hidden or (places and token.kind == words.UNCLEAR):
                unclear.append(token.text)
        start += len(clause) + 1
    return unclear


def _items(tokens: Sequence[Token]) -> tuple[list[_Item], list[str]]:
    """Return the sides and zones of a sentence, and the kinds of the words after each of them."""
    items: list[_Item] = []
    gaps: list[str] = []
    ranging = False
    for token in tokens:
        sides, zones = _named(token)
        if sides or zones:
            if ranging and {"upper", "lower"} == zones | items[-1].zones:
                zones |= {"middle"}  # "from the upper to the lower zone"
            items.append(_Item(sides, zones))
            gaps.append("")
        elif items:
            gaps[-1] += token.kind
        ranging = bool(items) and (token.text in ("to", "through") or (ranging and token.kind == words.FILLER))
    return items, gaps


def _named(token: Token) -> tuple[frozenset[str], frozenset[str]]:
    none = frozenset[str]()
    if token.kind == words.SITE:
        side, zone = token.value.split()
        return frozenset({side}), frozenset({zone})
    return {
        words.SIDE: (frozenset({token.value}), none),
        words.BOTH: (frozenset(SIDES), none),
        words.ZONE: (none, frozenset({token.value})),
        words.ALL: (none, frozenset(ZONES)),
    }.get(token.kind, (none, none))


def _read_count(tokens: Sequence[Token], kinds: str) -> int | None:
    """Return the number before a noun, or None if there is none or several."""
    stated = {_number(tokens[found.start()].text) for found in _COUNT.finditer(kinds)}
    return stated.pop() if len(stated) == 1 else None


def _number(word: str) -> int:
    return int(word) if word.isdecimal() else NUMBERS.index(word) + 1


def _best_readings(items: Sequence[_Item], gaps: Sequence[str]) -> set[frozenset[tuple[str, str]] | None]:
    """Return the sites of at most two cheapest ways to split the items into phrases; None if a zone has no side.

    Dynamic programming from the last item to the first, cubic in the number of items.
    """
    best: list[tuple[int, set[frozenset[tuple[str, str]] | None]]] = [(0, {frozenset()})]
    for start in range(len(items) - 1, -1, -1):
        ways: list[tuple[int, set[frozenset[tuple[str, str]] | None]]] = []
        for phrase in _phrases(items, gaps, start):
            rest_cost, rest = best[len(items) - start - phrase.length]
            alone = phrase.cost == ZONE_ALONE
            joined = {None if alone or sites is None else sites | phrase.sites for sites in rest}
            ways.append((phrase.cost + rest_cost, joined))
        least = min(cost for cost, _ in ways)
        found: set[frozenset[tuple[str, str]] | None] = set().union(*(sites for cost, sites in ways if cost == least))
        best.append((least, set(sorted(found, key=str)[:2])))
    return best[-1][1]


def _phrases(items: Sequence[_Item], gaps: Sequence[str], start: int) -> Iterator[_Phrase]:
    """Yield the phrases that can begin at `start`: a site, a side or zone alone, sides with zones, zones with sides."""
    item = items[start]
    if item.sides and item.zones:
        yield _Phrase(1, 0, frozenset(product(item.sides, item.zones)))
    elif item.sides:
        yield _Phrase(1, SIDE_ALONE, frozenset())
        for sides in _side_lists(items, gaps, start):
            after = start + sides
            across = _SIDE_THEN_ZONE.fullmatch(gaps[after - 1])
            if across is not None:
                for zones, cost in _zone_lists(items, gaps, after):
                    cost += ACROSS_COMMA * (words.COMMA in across[0])
                    yield _join(items[start : after + zones], cost)
    else:
        yield _Phrase(1, ZONE_ALONE, frozenset())
        for zones, cost in _zone_lists(items, gaps, start):
            after = start + zones
            across = _ZONE_THEN_SIDE.fullmatch(gaps[after - 1])
            for sides in _side_lists(items, gaps, after) if across is not None else ():
                shared = sides > 1 and words.PREPOSITION not in gaps[after - 1] and item.zones != frozenset(ZONES)
                extra = SHARED_ZONE * shared + ACROSS_COMMA * (words.COMMA in gaps[after - 1])
                yield _join(items[start : after + sides], cost + extra)


def _join(items: Sequence[_Item], cost: int) -> _Phrase:
    sides = frozenset[str]().union(*(item.sides for item in items))
    zones = frozenset[str]().union(*(item.zones for item in items))
    return _Phrase(len(items), cost, frozenset(product(sides, zones)))


def _side_lists(items: Sequence[_Item], gaps: Sequence[str], start: int) -> Iterator[int]:
    """Yield how many sides from `start` may share their zones: one, or two joined by "and"."""
    alone = [bool(item.sides and not item.zones) for item in items[start : start + 2]]
    if alone[:1] == [True]:
        yield 1
        if alone == [True, True] and _SIDES_LISTED.fullmatch(gaps[start]):
            yield 2


def _zone_lists(items: Sequence[_Item], gaps: Sequence[str], start: int) -> Iterator[tuple[int, int]]:
    """Yield (length, cost) of the lists of zones that can begin at `start`; "upper and lower zones" is not split."""
    cost = 0
    for stop in range(start, len(items)):
        if items[stop].sides:
            return
        open_list = stop + 1 < len(items) and not items[stop + 1].sides and _ZONES_LISTED.fullmatch(gaps[stop])
        if not (open_list and words.NOUN not in gaps[stop] and _is_closed(items, gaps, stop + 1)):
            yield stop + 1 - start, cost
        if not open_list:
            return
        cost += LIST_THROUGH_NOUN * (words.NOUN in gaps[stop])


def _is_closed(items: Sequence[_Item], gaps: Sequence[str], at: int) -> bool:
    """Whether the list of zones that continues at `at` ends with a noun."""
    while at + 1 < len(items) and not items[at + 1].sides and not gaps[at].startswith(words.NOUN):
        if not _ZONES_LISTED.fullmatch(gaps[at]):
            return False
        at += 1
    return gaps[at].startswith(words.NOUN)
