"""Repair spelling errors in prompts, in the words that name places in the lungs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cclip_deploy.common.limits import LONGEST_PROMPT
from cclip_deploy.errors import PromptError, UsageError
from cclip_deploy.prompts.template import NUMBERS, parse_or_none

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
"""Words that are repaired in any text."""
FORM = frozenset(_WORDS["form"].split())
"""Short words of the published sentences. Many words resemble them, so they are repaired only among known words."""
KNOWN = ANATOMY | FORM
OTHER_WORDS = frozenset(_WORDS["other"].split())
"""English words within one or two edits of a known word; they are never repaired."""

SHORTEST, LONGEST = 3, 60
"""Length in letters of the words that are checked."""
TWO_EDITS_FROM = 10
"""Length in letters from which a known word may be two edits away."""
_LONGEST_KNOWN = max(map(len, KNOWN))
LONGEST_TEXT = 1000
"""Longer texts, in characters, are not repaired."""
_WORD = re.compile(r"[^\W\d_]+")
_MARKS = re.compile(r"[\s.,;:]*")
_SIDE = frozenset({"left", "right"})
_BARE_SENTENCE = re.compile(
    rf"(\w+ pulmonary infection) ((?:{'|'.join(NUMBERS)}) infected areas?) ((?:\w+ )+lung)", re.IGNORECASE
)


@dataclass(frozen=True)
class Repair:
    """A replacement in a prompt."""

    found: str
    put: str


@dataclass(frozen=True)
class RepairedPrompt:
    """A prompt as written and as repaired; both are equal if nothing was repaired."""

    written: str
    text: str
    repairs: tuple[Repair, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {"written": self.written, "text": self.text, "repairs": [vars(repair) for repair in self.repairs]}

    def describe(self) -> str:
        """Format the repairs as a sentence."""
        repairs = ", ".join(f"{repair.found!r} to {repair.put!r}" for repair in self.repairs)
        return f"Repaired prompt {self.written!r}: {repairs}"


def check_prompt(text: str) -> None:
    """Raise PromptError if a text has more than LONGEST_PROMPT characters."""
    if len(text) > LONGEST_PROMPT:
        raise PromptError(
            f"The prompt {text[:40]!r}… has {len(text):,} characters; the limit is {LONGEST_PROMPT:,}. Shorten it."
        )


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """Return prompts as a list; a bare string is one prompt. Raise UsageError if one is not text."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in listed:
        if not isinstance(prompt, str):
            raise UsageError(f"The prompt {prompt!r} is of type {type(prompt).__name__}, not text. Give a string.")
    return listed


def repair_prompt(written: str) -> RepairedPrompt:
    """Repair misspelled, repeated, run-together and broken words that name places in the lungs.

    In any text, misspelled anatomical words are corrected (see `respell`), and repeated ones are removed. In a text of
    only the words of the published sentences, short words, broken words and missing commas, spaces and full stops are
    repaired too. No other word is changed, and the operation is idempotent.

    Raises:
        PromptError: the text has more than LONGEST_PROMPT characters.
    """
    check_prompt(written)
    if len(written) > LONGEST_TEXT or parse_or_none(written) is not None:
        return RepairedPrompt(written, written)
    words, gaps = _WORD.findall(written), _WORD.split(written)
    if not words:
        return RepairedPrompt(written, written)
    repairs: list[Repair] = []
    joined, joined_gaps = _join_broken(words, gaps, repairs)
    if not _all_known(joined):
        repairs, joined, joined_gaps = [], words, gaps
    among_known = _all_known(joined)
    text = _interleave([_repair_word(word, among_known, repairs) for word in joined], joined_gaps)
    text = _drop_doubled(text, among_known, repairs)
    if among_known and (punctuated := _punctuate(text)) != text:
        repairs.append(Repair(text, punctuated))
        text = punctuated
    return RepairedPrompt(written, text, tuple(repairs))


def repair_prompts(written: str | Sequence[str], repair: bool = True) -> list[RepairedPrompt]:
    """Repair all prompts, or only check their length if `repair` is False; raises like these.

    See `prompt_list` for what is a prompt and `repair_prompt` for what is repaired.
    """
    texts = prompt_list(written)
    for text in texts:
        check_prompt(text)
    return [repair_prompt(text) if repair else RepairedPrompt(text, text) for text in texts]


@lru_cache(1 << 14)
def respell(word: str, among_known: bool = False) -> str | None:
    """Return the correction of a lower-case word (several words if they were run together), or None.

    A word is corrected if it is a known word with a letter doubled, or one edit (deletion, insertion, substitution or
    transposition) from exactly one known word; two edits for known words of ten letters or more. Its first letter must
    be the first or second of the known word, it must not add another letter at the end ("rights"), and it must not be
    in OTHER_WORDS. With `among_known`, the words of FORM are known, too.
    """
    if not SHORTEST <= len(word) <= LONGEST or word in KNOWN or word in OTHER_WORDS:
        return None
    return _split(word) or _nearest(word, KNOWN if among_known else ANATOMY)


def resembles(word: str, known: Iterable[str]) -> bool:
    """Return whether a lower-case word is at most one edit from one of `known`."""
    return word not in OTHER_WORDS and any(
        abs(len(word) - len(k)) < 2 and edit_distance(word, k, 1) <= 1 for k in known
    )


def edit_distance(word: str, other: str, most: int) -> int:
    """Return the optimal string alignment distance of two words, or a larger number if it is above `most`.

    Only a band of width `most` around the diagonal is computed.
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


def _all_known(words: Sequence[str]) -> bool:
    """Whether the words, after correction, are all words of the published sentences and include a side."""
    meant = [word.lower() if word.lower() in KNOWN else respell(word.lower(), among_known=True) for word in words]
    return None not in meant and any(_SIDE & set((word or "").split()) for word in meant)


def _join_broken(words: Sequence[str], gaps: Sequence[str], repairs: list[Repair]) -> tuple[list[str], list[str]]:
    """Join two neighboring unknown words that together are a known one: "lo wer" becomes "lower"."""
    joined, joined_gaps = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        whole = joined[-1] + word
        unknown = joined[-1].lower() not in KNOWN and word.lower() not in KNOWN
        if unknown and gap.isspace() and whole.lower() in KNOWN:
            repairs.append(Repair(joined[-1] + gap + word, whole))
            joined[-1] = whole
        else:
            joined.append(word)
            joined_gaps.append(gap)
    return joined, [*joined_gaps, gaps[-1]]


def _repair_word(word: str, among_known: bool, repairs: list[Repair]) -> str:
    meant = respell(word.lower(), among_known)
    if meant is None:
        return word
    meant = meant.upper() if word.isupper() else meant.capitalize() if word[0].isupper() else meant
    repairs.append(Repair(word, meant))
    return meant


def _drop_doubled(text: str, among_known: bool, repairs: list[Repair]) -> str:
    """Remove repeated words: "left left lung" becomes "left lung"."""
    words, gaps = _WORD.findall(text), _WORD.split(text)
    unique, unique_gaps = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        repeated = gap.isspace() and word.lower() == unique[-1].lower()
        if repeated and word.lower() in (KNOWN if among_known else ANATOMY):
            repairs.append(Repair(unique[-1] + gap + word, unique[-1]))
        else:
            unique.append(word)
            unique_gaps.append(gap)
    return _interleave(unique, [*unique_gaps, gaps[-1]])


def _interleave(words: Sequence[str], gaps: Sequence[str]) -> str:
    return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:], strict=True))


def _punctuate(text: str) -> str:
    """Insert the commas and full stop of the published sentence form, if the words make such a sentence."""
    if parse_or_none(text) is not None or not _MARKS.fullmatch("".join(_WORD.split(text))):
        return text
    bare = _BARE_SENTENCE.fullmatch(" ".join(_WORD.findall(text)))
    if bare is None:
        return text
    sentence = f"{', '.join(bare.groups())}."
    return sentence if parse_or_none(sentence) is not None else text


def _nearest(word: str, known: frozenset[str]) -> str | None:
    doubled = {word[:at] + word[at + 1 :] for at in range(1, len(word)) if word[at] == word[at - 1]} & known
    if len(doubled) == 1:
        return doubled.pop()
    found: dict[int, list[str]] = defaultdict(list)
    for meant in sorted(known):
        most = 2 if len(meant) >= TWO_EDITS_FROM else 1
        if word[0] in meant[:2] and abs(len(word) - len(meant)) <= most and not _has_an_ending(word, meant):
            distance = edit_distance(word, meant, most)
            if distance <= most:
                found[distance].append(meant)
    closest = found[min(found)] if found else []
    return closest[0] if len(closest) == 1 else None


def _has_an_ending(word: str, meant: str) -> bool:
    return word.startswith(meant) and word[-1] != meant[-1]


def _split(word: str) -> str | None:
    """Split a run-together word into known words of three letters or more, at least one of ANATOMY.

    Longer words are preferred. Dynamic programming visits each position once, so the cost is linear in the letters.
    """
    reached: dict[int, str] = {len(word): ""}
    for start in range(len(word) - SHORTEST, -1, -1):
        for stop in range(min(len(word), start + _LONGEST_KNOWN), start + SHORTEST - 1, -1):
            if stop in reached and word[start:stop] in KNOWN:
                reached[start] = f"{word[start:stop]} {reached[stop]}".rstrip()
                break
    parts = reached.get(0, "").split()
    return " ".join(parts) if len(parts) > 1 and not ANATOMY.isdisjoint(parts) else None
