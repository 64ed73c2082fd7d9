"""Prompt controls: the same images with other prompts, to test whether a network follows its prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cclip_deploy.prompts.reader import meaning, mirror, read_prompt

NEUTRAL = "a medical image"
MEANINGS = {
    "shuffled": "every other prompt of the split, weighted by its number of rows",
    "fixed": "the most common prompt of the split for every row",
    "neutral": f"“{NEUTRAL}” for every row",
    "empty": "no words: only the start and end tokens",
    "side-swapped": "the row's own prompt with left and right exchanged",
}
MOST_ANSWERS = 50_000
"""Maximum number of predictions for which the shuffled control uses all other prompts."""
FEWEST_DRAWN = 8
"""Minimum number of prompts sampled per row if the shuffled control cannot use all."""

SAME_MEANING = "the other prompt has the same meaning"
NOT_UNDERSTOOD = "not parsed, so its sides cannot be exchanged reliably"
NO_SIDE = "names no side"
ONLY_MEANING = "all prompts of the split have the same meaning"


@dataclass(frozen=True)
class Control:
    """The other prompts of every row with weights that sum to 1; empty for a row that is left out."""

    name: str
    prompts: tuple[Mapping[str, float], ...]
    reasons: tuple[str, ...]
    """Why each row is left out; empty if it is not."""
    drawn: int | None = None
    """Number of prompts sampled per row; None if all were used."""

    @staticmethod
    def single(name: str, texts: Sequence[str | None], reasons: Sequence[str] | str = SAME_MEANING) -> Control:
        """Return a control with one prompt per row; None leaves the row out, for its reason or a common one."""
        row_reasons = [reasons] * len(texts) if isinstance(reasons, str) else reasons
        excluded = tuple(reason if text is None else "" for text, reason in zip(texts, row_reasons, strict=True))
        return Control(name, tuple({} if text is None else {text: 1.0} for text in texts), excluded)

    def of_rows(self, rows: Sequence[int]) -> Control:
        """Return the control restricted to some rows."""
        prompts, reasons = tuple(self.prompts[row] for row in rows), tuple(self.reasons[row] for row in rows)
        return replace(self, prompts=prompts, reasons=reasons)

    @property
    def meaning(self) -> str:
        """Description of the prompts."""
        drawn = "" if self.drawn is None else f"; {self.drawn} sampled per row"
        return MEANINGS[self.name] + drawn

    @property
    def missing(self) -> str | None:
        """Why all rows are left out; None if some are not."""
        if any(self.prompts):
            return None
        return f"every row is left out: {Counter(self.reasons).most_common(1)[0][0]}"


def make_controls(texts: Sequence[str], seed: int = 0, most_answers: int = MOST_ANSWERS) -> list[Control]:
    """Return all controls in the order of `MEANINGS`.

    A control uses only prompts whose meaning (`prompts.reader.meaning`) differs from the row's own; others would dilute
    the difference.

    Args:
        texts: The prompt of each row.
        seed: Seed of the sampling for the shuffled control; unused if all prompts are used.
        most_answers: Maximum number of predictions for which the shuffled control uses all other prompts.
    """
    return [
        _shuffled(texts, seed, most_answers),
        _same_for_all("fixed", texts, Counter(sorted(texts)).most_common(1)[0][0]),
        _same_for_all("neutral", texts, NEUTRAL),
        _same_for_all("empty", texts, ""),
        _side_swapped(texts),
    ]


def _shuffled(texts: Sequence[str], seed: int, most_answers: int) -> Control:
    """Use every other prompt weighted by its rows, or a stratified sample for each row if there are too many.

    The sample takes one random row from each of equally large strata of the other rows, ordered by meaning. Its mean is
    unbiased. Rows sample independently, so an interval over rows includes the sampling error.
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
    prompts = tuple(_draw(tables[text], drawn, rng) for text in texts)
    return Control("shuffled", prompts, reasons, drawn)


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
    other = meaning(sentence)
    means = {text: meaning(text) for text in set(texts)}
    return Control.single(name, [None if means[text] == other else sentence for text in texts])


def _side_swapped(texts: Sequence[str]) -> Control:
    swapped = {text: _swap(text) for text in set(texts)}
    return Control.single("side-swapped", [swapped[t][0] for t in texts], [swapped[t][1] for t in texts])


def _swap(text: str) -> tuple[str | None, str]:
    """Return the prompt with its sides exchanged, or None and the reason."""
    other, reading = mirror(text), read_prompt(text)
    if other is None:
        return None, NOT_UNDERSTOOD
    if not reading.sides:
        return None, NO_SIDE
    symmetric = reading.zones == reading.zones.mirrored() and len(reading.sides) == 2
    return (None, SAME_MEANING) if symmetric else (other, "")
