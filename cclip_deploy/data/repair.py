"""Typing errors in prompts of QaTa-COV19's form: found, repaired, reported; what is right or of another form stays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from cclip_deploy.data.template import NUMBERS, SIDES, ZONES, parse_or_none

WORDS = frozenset({
    "unilateral", "bilateral", "pulmonary", "infection", "infected", "area", "areas", "lung", "and", "all",
    *NUMBERS, *ZONES, *SIDES,
})  # fmt: skip
"""Every word of the form."""

LIKE = 0.74
"""Least likeness (`SequenceMatcher.ratio`) of a misspelt word to the one meant; several must not become seven."""
SHORTEST_WORD, LONGEST_TEXT = 3, 1000
_WORD = re.compile(r"[^\W\d_]+")
_MARKS = re.compile(r"[\s.,;:]*")
_LUNG = re.compile(r"\b(left|right)\s+lung\b", re.IGNORECASE)
_BARE_SENTENCE = re.compile(
    rf"(\w+ pulmonary infection) ((?:{'|'.join(NUMBERS)}) infected areas?) ((?:\w+ )+lung)", re.IGNORECASE
)


@dataclass(frozen=True)
class Repair:
    """What stood in a prompt, and what was put there."""

    found: str
    put: str


@dataclass(frozen=True)
class RepairedPrompt:
    """A prompt as it was written and as it is used; the same where there was nothing to repair."""

    written: str
    text: str
    repairs: tuple[Repair, ...] = ()


def repair_prompt(written: str) -> RepairedPrompt:
    """Repair misspelt, doubled, run-together and broken words, and lost commas, spaces and stops.

    A text that parses is left alone, and so is one that, repaired, would hold a word outside the form or name no lung:
    free text is never bent into the form. Repairing twice repairs nothing more.
    """
    if len(written) > LONGEST_TEXT or parse_or_none(written) is not None:
        return RepairedPrompt(written, written)
    return _repair_text(written) or RepairedPrompt(written, written)


def _repair_text(written: str) -> RepairedPrompt | None:
    """The repaired prompt, or None where its words are not those of the form."""
    words, gaps = _WORD.findall(written), _WORD.split(written)
    known = sum(word.lower() in WORDS for word in words)
    if not words or 3 * known < len(words):
        return None
    repairs: list[Repair] = []
    words, gaps = _join_broken(words, gaps, repairs)
    text = _weave([_repair_word(word, repairs) for word in words], gaps)
    words, gaps = _WORD.findall(text), _WORD.split(text)
    if not all(word.lower() in WORDS for word in words):
        return None
    words, gaps = _drop_doubled(words, gaps, repairs)
    text = _weave(words, gaps)
    if not _LUNG.search(text):
        return None
    punctuated = _punctuate(text)
    if punctuated != text:
        repairs.append(Repair(text, punctuated))
    return RepairedPrompt(written, punctuated, tuple(repairs))


def _join_broken(words: Sequence[str], gaps: Sequence[str], repairs: list[Repair]) -> tuple[list[str], list[str]]:
    """ "lo wer" becomes "lower": two neighbours, neither a word of the form, that are one together."""
    joined, kept = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        whole = joined[-1] + word
        strange = joined[-1].lower() not in WORDS and word.lower() not in WORDS
        if strange and gap.isspace() and whole.lower() in WORDS:
            repairs.append(Repair(joined[-1] + gap + word, whole))
            joined[-1] = whole
        else:
            joined.append(word)
            kept.append(gap)
    return joined, [*kept, gaps[-1]]


def _repair_word(word: str, repairs: list[Repair]) -> str:
    """The word of the form that was meant, two where they had run together, or the word itself where none is near."""
    lowered = word.lower()
    if lowered in WORDS or len(lowered) < SHORTEST_WORD:
        return word
    meant = _split_glued(lowered) or _nearest(lowered)
    if meant is None:
        return word
    meant = meant.capitalize() if word[0].isupper() else meant
    repairs.append(Repair(word, meant))
    return meant


def _split_glued(word: str) -> str | None:
    for at in range(SHORTEST_WORD, len(word) - SHORTEST_WORD + 1):
        rest = word[at:] if word[at:] in WORDS else _split_glued(word[at:])
        if word[:at] in WORDS and rest:
            return f"{word[:at]} {rest}"
    return None


def _nearest(word: str) -> str | None:
    """The word of the form with the same letters, or the one most like it, if like enough and no other is as like."""
    ranked = sorted(((_likeness(word, known), known) for known in WORDS), reverse=True)
    (best, meant), (second, _) = ranked[:2]
    return meant if best >= LIKE and best > second else None


def _likeness(word: str, known: str) -> float:
    return 1.0 if sorted(word) == sorted(known) else SequenceMatcher(None, word, known).ratio()


def _drop_doubled(words: Sequence[str], gaps: Sequence[str], repairs: list[Repair]) -> tuple[list[str], list[str]]:
    """ "left left lung" becomes "left lung"."""
    kept, between = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        if gap.isspace() and word.lower() == kept[-1].lower():
            repairs.append(Repair(kept[-1] + gap + word, kept[-1]))
        else:
            kept.append(word)
            between.append(gap)
    return kept, [*between, gaps[-1]]


def _weave(words: Sequence[str], gaps: Sequence[str]) -> str:
    return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:], strict=True))


def _punctuate(text: str) -> str:
    """The same words with the form's commas and stop; the text itself where they make no sentence of the form."""
    if parse_or_none(text) is not None or not _MARKS.fullmatch("".join(_WORD.split(text))):
        return text
    bare = _BARE_SENTENCE.fullmatch(" ".join(_WORD.findall(text)))
    if bare is None:
        return text
    sentence = f"{', '.join(bare.groups())}."
    return sentence if parse_or_none(sentence) is not None else text
