"""Prompt controls: the same images with other sentences, to see whether the sentence finds the mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cclip_deploy.prompts.reader import meaning, mirror, read_prompt

NEUTRAL = "a medical image"
MEANINGS = {
    "shuffled": "every other sentence of the split, averaged by how many rows have it",
    "fixed": "the commonest sentence of the split for every row",
    "neutral": f"“{NEUTRAL}” for every row",
    "empty": "no word at all: the start and the end token alone",
    "side-swapped": "its own sentence with left and right exchanged",
}
MOST_ANSWERS = 50_000
"""Pairs of a row and another sentence up to which the shuffled control uses all of them."""
FEWEST_DRAWN = 8
"""Sentences that are drawn for each row where all would be too many; more if there is room below `MOST_ANSWERS`."""

SAME_MEANING = "the other sentence would mean the same"
NOT_UNDERSTOOD = "not understood, so that its sides cannot be exchanged for sure"
NO_SIDE = "names no side"
ONLY_MEANING = "no sentence of the split means anything else"


@dataclass(frozen=True)
class Control:
    """For every row the other sentences, with weights whose sum is 1; none for a row that the control leaves out."""

    name: str
    asked: tuple[Mapping[str, float], ...]
    reasons: tuple[str, ...]
    """For every row why it is left out; empty where it is not."""
    drawn: int | None = None
    """How many sentences were drawn for each row, where not all were used."""

    @staticmethod
    def single(name: str, texts: Sequence[str | None], reasons: Sequence[str] | str = SAME_MEANING) -> Control:
        """A control with one sentence a row; None leaves the row out, for its reason or for the one given for all."""
        each = [reasons] * len(texts) if isinstance(reasons, str) else reasons
        why = tuple(reason if text is None else "" for text, reason in zip(texts, each, strict=True))
        return Control(name, tuple({} if text is None else {text: 1.0} for text in texts), why)

    def of_rows(self, rows: Sequence[int]) -> Control:
        """The same control for some of the rows."""
        asked, reasons = tuple(self.asked[row] for row in rows), tuple(self.reasons[row] for row in rows)
        return replace(self, asked=asked, reasons=reasons)

    @property
    def meaning(self) -> str:
        """What the sentences are."""
        drawn = "" if self.drawn is None else f"; {self.drawn} drawn for each row"
        return MEANINGS[self.name] + drawn

    @property
    def missing(self) -> str | None:
        """Why no row takes part, in words; None where some do."""
        if any(self.asked):
            return None
        return f"every row is left out: {Counter(self.reasons).most_common(1)[0][0]}"


def make_controls(texts: Sequence[str], seed: int = 0, most_answers: int = MOST_ANSWERS) -> list[Control]:
    """All controls for the rows' own texts, in the order of `MEANINGS`.

    A row takes part in a control only with sentences that mean something else than its own (`prompt_reader.meaning`);
    others would only dilute the difference.

    Args:
        texts: one for each row.
        seed: of the sentences drawn for the shuffled control; without effect where all are used.
        most_answers: pairs of a row and another sentence up to which the shuffled control uses all.
    """
    return [
        _shuffled(texts, seed, most_answers),
        _same_for_all("fixed", texts, Counter(sorted(texts)).most_common(1)[0][0]),
        _same_for_all("neutral", texts, NEUTRAL),
        _same_for_all("empty", texts, ""),
        _side_swapped(texts),
    ]


def _shuffled(texts: Sequence[str], seed: int, most_answers: int) -> Control:
    """Every other sentence, weighted by its rows; where they are too many, a stratified sample of them for each row.

    The sample takes one row at random from each of equally large strata of all other rows, ordered by what they say.
    Its mean is right on average, and as rows draw independently, an interval over rows holds the sample's error.
    """
    counts = Counter(texts)
    means = {text: meaning(text) for text in counts}
    ordered = sorted(counts, key=lambda text: (str(means[text]), text))
    others = {own: [text for text in ordered if means[text] != means[own]] for own in counts}
    tables = {own: _weigh([(text, counts[text]) for text in rest]) for own, rest in others.items()}
    reasons = tuple("" if tables[text] else ONLY_MEANING for text in texts)
    if sum(len(others[text]) for text in texts) <= most_answers:
        return Control("shuffled", tuple(tables[text] for text in texts), reasons)
    drawn = max(FEWEST_DRAWN, most_answers // len(texts))
    rng = np.random.default_rng(seed)
    asked = tuple(_draw(tables[text], drawn, rng) for text in texts)
    return Control("shuffled", asked, reasons, drawn)


def _weigh(counted: Sequence[tuple[str, int]]) -> dict[str, float]:
    total = sum(count for _, count in counted)
    return {text: count / total for text, count in counted}


def _draw(table: Mapping[str, float], count: int, rng: np.random.Generator) -> Mapping[str, float]:
    if not table:
        return {}
    places = (np.arange(count) + rng.random(count)) / count
    ends = np.cumsum(list(table.values()))
    chosen = np.minimum(np.searchsorted(ends, places, side="right"), len(table) - 1)
    names = list(table)
    return _weigh(list(Counter(names[at] for at in chosen).items()))


def _same_for_all(name: str, texts: Sequence[str], sentence: str) -> Control:
    said = meaning(sentence)
    means = {text: meaning(text) for text in set(texts)}
    return Control.single(name, [None if means[text] == said else sentence for text in texts])


def _side_swapped(texts: Sequence[str]) -> Control:
    swapped = {text: _swap(text) for text in set(texts)}
    return Control.single("side-swapped", [swapped[t][0] for t in texts], [swapped[t][1] for t in texts])


def _swap(text: str) -> tuple[str | None, str]:
    """The sentence with its sides exchanged, or None and why it has none that means something else."""
    other, reading = mirror(text), read_prompt(text)
    if other is None:
        return None, NOT_UNDERSTOOD
    if not reading.sides:
        return None, NO_SIDE
    symmetric = reading.zones == reading.zones.mirrored() and len(reading.sides) == 2
    return (None, SAME_MEANING) if symmetric else (other, "")
