"""Typing errors in prompts: found, repaired, reported. One rule for training, evaluation and inference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cclip_deploy.common.limits import LONGEST_PROMPT
from cclip_deploy.errors import PromptError
from cclip_deploy.prompts.corrections import ANATOMY, KNOWN, respell
from cclip_deploy.prompts.template import NUMBERS, parse_or_none

LONGEST_TEXT = 1000
"""Characters of a text that is looked at."""
_WORD = re.compile(r"[^\W\d_]+")
_MARKS = re.compile(r"[\s.,;:]*")
_SIDE = frozenset({"left", "right"})
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {"written": self.written, "text": self.text, "repairs": [vars(repair) for repair in self.repairs]}

    def describe(self) -> str:
        """A sentence on what was repaired, for tables and notes."""
        repairs = ", ".join(f"{repair.found!r} to {repair.put!r}" for repair in self.repairs)
        return f"Repaired prompt {self.written!r}: {repairs}"


def check_prompt(text: str) -> None:
    """PromptError where a text has more than LONGEST_PROMPT characters."""
    if len(text) > LONGEST_PROMPT:
        raise PromptError(
            f"The prompt {text[:40]!r}… has {len(text):,} characters; up to {LONGEST_PROMPT:,} are read. Shorten it."
        )


def repair_prompt(written: str) -> RepairedPrompt:
    """Repair misspelt, doubled, run-together and broken words that say where in the lungs.

    In any text, a misspelt word of the anatomy is repaired (`spelling.respell`), and one that stands twice is written
    once. In a text that holds nothing but words of the published sentences, their short words, broken words and lost
    commas, spaces and stops are repaired too. No other word is touched; repairing twice repairs nothing more.

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
    joined, kept = _join_broken(words, gaps, repairs)
    if not _all_known(joined):
        repairs, joined, kept = [], words, gaps
    among_known = _all_known(joined)
    text = _weave([_repair_word(word, among_known, repairs) for word in joined], kept)
    text = _drop_doubled(text, among_known, repairs)
    if among_known and (punctuated := _punctuate(text)) != text:
        repairs.append(Repair(text, punctuated))
        text = punctuated
    return RepairedPrompt(written, text, tuple(repairs))


def repair_prompts(written: Sequence[str], repair: bool = True) -> list[RepairedPrompt]:
    """All prompts repaired, or as they were written where `repair` is False. PromptError as `repair_prompt`."""
    for text in written:
        check_prompt(text)
    return [repair_prompt(text) if repair else RepairedPrompt(text, text) for text in written]


def _all_known(words: Sequence[str]) -> bool:
    """Whether the words, once repaired, are those of the published sentences and name a side."""
    meant = [word.lower() if word.lower() in KNOWN else respell(word.lower(), among_known=True) for word in words]
    return None not in meant and any(_SIDE & set((word or "").split()) for word in meant)


def _join_broken(words: Sequence[str], gaps: Sequence[str], repairs: list[Repair]) -> tuple[list[str], list[str]]:
    """ "lo wer" becomes "lower": two neighbors, neither a known word, that are one together."""
    joined, kept = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        whole = joined[-1] + word
        strange = joined[-1].lower() not in KNOWN and word.lower() not in KNOWN
        if strange and gap.isspace() and whole.lower() in KNOWN:
            repairs.append(Repair(joined[-1] + gap + word, whole))
            joined[-1] = whole
        else:
            joined.append(word)
            kept.append(gap)
    return joined, [*kept, gaps[-1]]


def _repair_word(word: str, among_known: bool, repairs: list[Repair]) -> str:
    meant = respell(word.lower(), among_known)
    if meant is None:
        return word
    meant = meant.upper() if word.isupper() else meant.capitalize() if word[0].isupper() else meant
    repairs.append(Repair(word, meant))
    return meant


def _drop_doubled(text: str, among_known: bool, repairs: list[Repair]) -> str:
    """ "left left lung" becomes "left lung"."""
    words, gaps = _WORD.findall(text), _WORD.split(text)
    kept, between = list(words[:1]), list(gaps[:1])
    for word, gap in zip(words[1:], gaps[1:-1], strict=True):
        doubled = gap.isspace() and word.lower() == kept[-1].lower()
        if doubled and word.lower() in (KNOWN if among_known else ANATOMY):
            repairs.append(Repair(kept[-1] + gap + word, kept[-1]))
        else:
            kept.append(word)
            between.append(gap)
    return _weave(kept, [*between, gaps[-1]])


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
