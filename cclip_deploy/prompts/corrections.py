"""Spelling of the words that say where in the lungs: the one meant by a misspelt word, or by several run together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

_WORDS = {
    "anatomy": """upper middle lower left right lung lungs lobe lobes zone zones field fields region regions area areas
    bilateral bilaterally unilateral pulmonary infection infections infected involving involved involvement
    affecting affected opacity opacities consolidation infiltrate infiltrates pneumonia entire hemithorax""",
    "form": "and all one two three four five six seven eight nine ten eleven twelve",
    "other": """any
    ara are areal arena arenas aria arias bath bight blower boat bolt boot boots bright broth cleft cloth
    consolation consolidating consolidator eight entice fiddle fiend fiends fight filed flower for fright heft
    hight inceptions inductions infecting infectious infested infiltrated infiltrators inflected inflection
    inflections inflictions infractions injected injection injections insertions inspections intentions
    inventions involve involves lang lent lest let lift light ling lob lobed lode lodes loft lone loner long
    longs lope lore lose loser loses love lover loves lowers lube lubes lug lugs luna lund lunge lunges lyft
    meddle middles might moth mower muddle night none once ones our ozone pneumonic power reft riddle rower
    sight slower supper then tight tooth tower unicameral upped uppers weft wight wright zoned""",
}
ANATOMY = frozenset(_WORDS["anatomy"].split())
"""Words that are repaired in any sentence."""
FORM = frozenset(_WORDS["form"].split())
"""Short words of the published sentences; many words are like them, so they are repaired among known ones only."""
KNOWN = ANATOMY | FORM
OTHER_WORDS = frozenset(_WORDS["other"].split())
"""English words that are one or two edits from a known word or from a side: they are right as they stand."""

SHORTEST, LONGEST = 3, 60
"""Letters of a word that is looked at: no misspelt word is shorter, and none run together longer."""
TWO_EDITS_FROM = 10
"""Letters from which a word may be two edits from what was typed."""
_LONGEST_KNOWN = max(map(len, KNOWN))


@lru_cache(1 << 14)
def respell(word: str, among_known: bool = False) -> str | None:
    """What a lower-case word was meant to be, two words or more where they had run together; None where it stays.

    A word is misspelt if it is a known word with a letter doubled, or one edit from exactly one known word: a letter
    dropped, added, replaced or exchanged with the next; from words of ten letters or more, two edits. Its first letter
    is that word's first or second, no letter but a doubled one is added at the end ("rights" is a word of its own), and
    it is none of `OTHER_WORDS`. With `among_known`, the words of `FORM` count too.
    """
    if not SHORTEST <= len(word) <= LONGEST or word in KNOWN or word in OTHER_WORDS:
        return None
    return _split(word) or _nearest(word, KNOWN if among_known else ANATOMY)


def resembles(word: str, known: Iterable[str]) -> bool:
    """Whether a lower-case word is one edit from one of `known`, wherever the edit lies."""
    return word not in OTHER_WORDS and any(abs(len(word) - len(k)) < 2 and edits(word, k, 1) <= 1 for k in known)


def edits(word: str, other: str, most: int) -> int:
    """Letters added, dropped, replaced or exchanged with the next between two words; above `most`, some larger number.

    The optimal string alignment distance, in a band of `most` about the diagonal.
    """
    if abs(len(word) - len(other)) > most:
        return most + 1
    beyond = most + 1
    before: list[int] = []
    row = [min(column, beyond) for column in range(len(other) + 1)]
    for i, letter in enumerate(word, 1):
        two_before, before = before, row
        row = [beyond] * (len(other) + 1)
        row[0] = min(i, beyond)
        for j in range(max(1, i - most), min(len(other), i + most) + 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other[j - 1]))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == other[j - 1]:
                row[j] = min(row[j], two_before[j - 2] + 1)
    return row[-1]


def _nearest(word: str, known: frozenset[str]) -> str | None:
    doubled = {word[:at] + word[at + 1 :] for at in range(1, len(word)) if word[at] == word[at - 1]} & known
    if len(doubled) == 1:
        return doubled.pop()
    found: dict[int, list[str]] = defaultdict(list)
    for meant in sorted(known):
        most = 2 if len(meant) >= TWO_EDITS_FROM else 1
        if word[0] in meant[:2] and abs(len(word) - len(meant)) <= most and not _has_an_ending(word, meant):
            distance = edits(word, meant, most)
            if distance <= most:
                found[distance].append(meant)
    closest = found[min(found)] if found else []
    return closest[0] if len(closest) == 1 else None


def _has_an_ending(word: str, meant: str) -> bool:
    return word.startswith(meant) and word[-1] != meant[-1]


def _split(word: str) -> str | None:
    """Known words of three letters or more that make up the whole word, one of them of the anatomy; the longest first.

    Work grows with the letters, not with the ways to split: each place is reached once, from the first word that does.
    """
    reached: dict[int, str] = {len(word): ""}
    for start in range(len(word) - SHORTEST, -1, -1):
        for stop in range(min(len(word), start + _LONGEST_KNOWN), start + SHORTEST - 1, -1):
            if stop in reached and word[start:stop] in KNOWN:
                reached[start] = f"{word[start:stop]} {reached[stop]}".rstrip()
                break
    parts = reached.get(0, "").split()
    return " ".join(parts) if len(parts) > 1 and not ANATOMY.isdisjoint(parts) else None
