"""Prompts to CLIP's byte-pair ids, exactly as open_clip's tokenizer gives them, without open_clip."""

from __future__ import annotations

import html
from pathlib import Path

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cclip_deploy.data.repair import check_prompt
from cclip_deploy.errors import DataError, PromptError

START, END = "<start_of_text>", "<end_of_text>"
# open_clip matches without regard to case: the long s (U+017F) passes for an s, and the iota below (U+0345), which is a
# mark, for a letter in the last class alone, so that it is dropped.
WORDS = "<[s\u017f]tart_of_text>|<end_of_text>|'[s\u017f]|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+"


def clean_prompt(text: str) -> str:
    """Repair encodings, resolve HTML entities twice, fold white space, lower: what open_clip does before it splits.

    PromptError where the text is longer than LONGEST_PROMPT characters, or has an entity of thousands of digits.
    """
    check_prompt(text)
    try:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    except ValueError as error:
        raise PromptError(f"The prompt {text[:40]!r}… has an HTML entity that cannot be read: {error}.") from error
    return " ".join(text.split()).strip().lower()


class PromptTokenizer:
    """CLIP's vocabulary in a Hugging Face `tokenizers` file, with open_clip's cleaning before it.

    Two differences are known: the text of a special token right after punctuation is one token here, and open_clip
    splits it; characters newer than the Unicode tables of `tokenizers` are no letters here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start_id = self._id(START)
        self.end_id = self._id(END)

    @staticmethod
    def load(path: Path) -> PromptTokenizer:
        """Read a tokenizer.json; a file that is none is a DataError."""
        try:
            return PromptTokenizer(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} is no tokenizer.json of `tokenizers`: {error}. Export the bundle again."
            ) from error

    @staticmethod
    def from_open_clip() -> PromptTokenizer:
        """Build the tokenizer from the vocabulary that open_clip carries."""
        from open_clip.tokenizer import SimpleTokenizer

        theirs = SimpleTokenizer()
        merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
        tokenizer = Tokenizer(
            models.BPE(vocab=theirs.encoder, merges=merges, end_of_word_suffix="</w>", fuse_unk=False)
        )
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([START, END])
        return PromptTokenizer(tokenizer)

    def to_json(self) -> str:
        """The whole tokenizer as `load` reads it."""
        return str(self._tokenizer.to_str(pretty=False))

    def ids(self, prompt: str) -> list[int]:
        """Start id, the prompt's ids, end id: as many as it takes."""
        return [self.start_id, *self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids, self.end_id]

    def encode(self, prompt: str, length: int) -> NDArray[np.int64]:
        """One row of `length` ids, zeros after the end token.

        Raises:
            PromptError: the prompt is empty, or takes more than `length` ids; nothing is ever cut silently.
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
        """As `encode`, but an over-long prompt is cut before its end token, as open_clip does; for training."""
        ids = self.ids(prompt)
        return self._row(ids if len(ids) <= length else [*ids[: length - 1], self.end_id], length)

    @staticmethod
    def _row(ids: list[int], length: int) -> NDArray[np.int64]:
        row = np.zeros(length, np.int64)
        row[: len(ids)] = ids
        return row

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"The tokenizer lacks {token}; it is not CLIP's. Export the bundle again.")
        return int(found)
