"""Prompt controls: the same pictures asked with other sentences, to see whether the sentence finds the mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cclip_deploy.data.prompt_reader import mirror
from cclip_deploy.errors import DataError
from cclip_deploy.train.scores import shuffle_prompts

NEUTRAL = "a medical image"
MEANINGS = {
    "shuffled": "another row's sentence",
    "fixed": "the commonest sentence of the split for every row",
    "neutral": f"“{NEUTRAL}” for every row",
    "empty": "no word at all: the start and the end token alone",
    "side-swapped": "its own sentence with left and right exchanged",
}


@dataclass(frozen=True)
class Control:
    """A control's sentence for every row; None where it has none that differs from the row's own."""

    name: str
    texts: tuple[str | None, ...]
    missing: str | None = None
    """Why no row has one, in words."""

    @property
    def meaning(self) -> str:
        """What the rows are asked."""
        return MEANINGS[self.name]


def make_controls(texts: Sequence[str], seed: int = 0) -> list[Control]:
    """All controls for the rows' own texts, in the order of `MEANINGS`.

    Rows that a control would ask with their own sentence are left out of it: they would only dilute the difference.
    """
    return [
        _shuffled(texts, seed),
        _same_for_all("fixed", texts, Counter(sorted(texts)).most_common(1)[0][0]),
        _same_for_all("neutral", texts, NEUTRAL),
        _same_for_all("empty", texts, ""),
        _side_swapped(texts),
    ]


def _shuffled(texts: Sequence[str], seed: int) -> Control:
    try:
        return Control("shuffled", tuple(shuffle_prompts(texts, seed)))
    except DataError as error:
        return Control("shuffled", (None,) * len(texts), str(error))


def _same_for_all(name: str, texts: Sequence[str], sentence: str) -> Control:
    asked = tuple(None if text == sentence else sentence for text in texts)
    return Control(name, asked, None if any(t is not None for t in asked) else "Every row has this sentence itself.")


def _side_swapped(texts: Sequence[str]) -> Control:
    swapped = tuple(other if (other := mirror(text)) is not None and other != text else None for text in texts)
    missing = None if any(swapped) else "No sentence names a side that can be exchanged."
    return Control("side-swapped", swapped, missing)
