"""Tokenize prompts with CLIP's byte-pair encoding, with the same ids as open_clip but without open_clip."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cclip_deploy.errors import DataError, PromptError
from cclip_deploy.prompts.spelling import check_prompt

START, END = "<start_of_text>", "<end_of_text>"
# open_clip's pattern ignores case, which makes the long s (U+017F) match s, and excludes the combining iota (U+0345),
# a mark, from the last class only, so that it is dropped.
WORDS = "<[s\u017f]tart_of_text>|<end_of_text>|'[s\u017f]|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+"

WORD_END = "</w>"
MOST_BYTES, MOST_TOKENS, MOST_LETTERS = 16 * 2**20, 65_536, 256
"""Limits of a tokenizer.json; CLIP's has 1.7 MB and 49,408 tokens. MOST_LETTERS is the longest token."""
FORM: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
MODEL_FORM: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": WORD_END,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
SPECIAL_FORM = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def clean_prompt(text: str) -> str:
    """Clean a text like open_clip: fix encodings, unescape HTML twice, collapse whitespace, and lower.

    Raises:
        PromptError: the text is longer than LONGEST_PROMPT characters, or has an HTML entity that is too large.
    """
    check_prompt(text)
    try:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    except ValueError as error:
        raise PromptError(f"The prompt {text[:40]!r}… has an HTML entity that cannot be read: {error}.") from error
    return " ".join(text.split()).strip().lower()


class PromptTokenizer:
    """CLIP's tokenizer, based on Hugging Face `tokenizers`, with open_clip's text cleaning.

    Two differences from open_clip are known: the text of a special token directly after punctuation is one token here
    and is split by open_clip; characters newer than the Unicode tables of `tokenizers` are not letters here.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """Build from the vocabulary (token to id, from 0) and the merges in order of priority."""
        self._tokenizer = _build(vocabulary, merges)
        self.vocabulary_size = len(vocabulary)
        self.start_id, self.end_id = vocabulary[START], vocabulary[END]

    @staticmethod
    def parse(content: bytes, path: Path) -> PromptTokenizer:
        """Parse the content of a tokenizer.json.

        Only vocabulary and merges are used. Everything else must equal what `to_json` writes and is not passed to
        `tokenizers`.

        Raises:
            DataError: the content is not a CLIP tokenizer; the message names `path` and the difference.
        """
        try:
            vocabulary, merges = _parse(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not CLIP's tokenizer: {str(error)[:300]}. It was not loaded. Export the bundle again."
            ) from error
        return PromptTokenizer(vocabulary, merges)

    @staticmethod
    def from_open_clip() -> PromptTokenizer:
        """Build the tokenizer from open_clip's vocabulary."""
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer()
        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
        return PromptTokenizer(tokenizer.encoder, merges)

    def to_json(self) -> str:
        """Return the tokenizer.json that `parse` reads."""
        return str(self._tokenizer.to_str(pretty=False))

    def ids(self, prompt: str) -> list[int]:
        """Return all ids of a prompt, with the start and end ids."""
        return [self.start_id, *self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids, self.end_id]

    def encode(self, prompt: str, length: int) -> NDArray[np.int64]:
        """Return one row of `length` ids (int64), padded with zeros after the end token.

        Raises:
            PromptError: the prompt is empty or needs more than `length` ids; prompts are never cut silently.
        """
        ids = self.ids(prompt)
        if len(ids) == 2:
            raise PromptError("The prompt is empty. Say what to segment, for example: lower left lung.")
        if len(ids) > length:
            raise PromptError(
                f"The prompt takes {len(ids)} tokens and the graph has room for {length}: {prompt!r}. "
                f"Shorten it, or export with --prompt-length {min(77, len(ids))} (at most 77)."
            )
        return self._row(ids, length)

    def encode_cut(self, prompt: str, length: int) -> NDArray[np.int64]:
        """Encode like `encode`, but truncate a long prompt before its end token like open_clip; for training."""
        ids = self.ids(prompt)
        return self._row(ids if len(ids) <= length else [*ids[: length - 1], self.end_id], length)

    @staticmethod
    def _row(ids: list[int], length: int) -> NDArray[np.int64]:
        row = np.zeros(length, np.int64)
        row[: len(ids)] = ids
        return row


def _build(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix=WORD_END, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _parse(content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges; raise ValueError or RecursionError if the content is invalid."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content)} bytes, more than {MOST_BYTES}")
    whole = json.loads(content.decode("utf-8"))
    if not isinstance(whole, dict) or not isinstance(whole.get("model"), dict):
        raise ValueError("it is not a JSON object with a model")
    rest = dict(whole)
    model, added = dict(rest.pop("model")), rest.pop("added_tokens", None)
    vocabulary, merges = _vocabulary(model.pop("vocab", None)), model.pop("merges", None)
    expected = [{"id": vocabulary[token], "content": token, **SPECIAL_FORM} for token in (START, END)]
    for what, found, form in (("", rest, FORM), ("model.", model, MODEL_FORM)):
        if found != form:
            names = sorted(name for name in {*found, *form} if found.get(name, "") != form.get(name, ""))
            raise ValueError(f"{', '.join(what + name for name in names)} differ from CLIP's")
    if not isinstance(added, list) or sorted(added, key=repr) != sorted(expected, key=repr):
        raise ValueError(f"the added tokens are not {START} and {END}")
    return vocabulary, _merges(merges, vocabulary)


def _vocabulary(found: object) -> dict[str, int]:
    """Check that the vocabulary has tokens of CLIP's alphabet with the ids 0, 1, 2, ... in any order."""
    if not isinstance(found, dict) or not len(found) <= MOST_TOKENS:
        raise ValueError(f"the vocabulary is not an object of at most {MOST_TOKENS} tokens")
    ids = list(found.values())
    if any(type(number) is not int for number in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"the ids are not 0 to {len(ids) - 1}, each once")
    unknown = set(chain.from_iterable(found)).difference(pre_tokenizers.ByteLevel.alphabet())
    if unknown or not all(0 < len(token) <= MOST_LETTERS for token in found):
        raise ValueError(f"a token is empty, longer than {MOST_LETTERS} or has characters outside the byte alphabet")
    if missing := [token for token in (START, END) if token not in found]:
        raise ValueError(f"the vocabulary lacks {missing[0]}")
    return found


def _merges(found: object, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Check that merges are pairs of tokens whose concatenation is a token; older `tokenizers` write a pair as text."""
    if not isinstance(found, list) or len(found) > MOST_TOKENS:
        raise ValueError(f"the merges are not a list of at most {MOST_TOKENS} pairs")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in found]
    merges = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError("a merge is not a pair of tokens")
        first, second = pair
        if not {first, second, first + second} <= vocabulary.keys():
            raise ValueError(f"{first!r}, {second!r} or their concatenation is not in the vocabulary")
        merges.append((first, second))
    return merges
