"""Describe how a prompt is repaired, parsed and tokenized."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue, UsageError
from cclip_deploy.prompts.reader import read_prompt
from cclip_deploy.prompts.spelling import RepairedPrompt, repair_prompts
from cclip_deploy.prompts.tokenizer import PromptTokenizer

SHORTEST_LENGTH, LONGEST_LENGTH, USUAL_LENGTH = 3, 77, 32


def open_tokenizer(bundle: Path | None, length: int | None) -> tuple[PromptTokenizer, int]:
    """Return the tokenizer and prompt length of a bundle, or open_clip's tokenizer and the default length.

    Args:
        bundle: a bundle's folder, if any.
        length: used instead of the bundle's or the default length.

    Raises:
        BundleError: the bundle cannot be opened.
        EnvironmentIssue: there is no bundle, and open_clip is not installed.
        UsageError: the length is out of range.
    """
    if length is not None and not SHORTEST_LENGTH <= length <= LONGEST_LENGTH:
        raise UsageError(f"A prompt length of {length} is out of range. Use {SHORTEST_LENGTH} to {LONGEST_LENGTH}.")
    if bundle is not None:
        opened = Bundle.open(bundle)
        return opened.tokenizer(), length or opened.manifest.prompt_length
    try:
        return PromptTokenizer.from_open_clip(), length or USUAL_LENGTH
    except ImportError as error:
        raise EnvironmentIssue(
            "Counting tokens without a bundle needs open_clip. Install it: pip install 'cclip-deploy[export]', "
            "or give a bundle with --bundle."
        ) from error


def describe_prompt(written: str, tokenizer: PromptTokenizer, length: int, repair: bool = True) -> dict[str, Any]:
    """Return the repaired text, the repairs, the lung zones that it names, and its tokens, as JSON.

    Zones are null if the text does not name any unambiguously. Raise PromptError if the text is empty.
    """
    (prompt,) = repair_prompts([written], repair)
    reading = read_prompt(prompt.text)
    tokenizer.encode(prompt.text, max(length, len(tokenizer.ids(prompt.text))))
    ids = tokenizer.ids(prompt.text)
    sites = reading.zones.sites()
    return {
        **prompt.to_dict(),
        "zones": {side: [z for s, z in sites if s == side] for side in ("left", "right")} if sites else None,
        "side": reading.side if reading.sides else None,
        "count": reading.count,
        "not_understood": list(reading.not_understood),
        "tokens": ids,
        "token_count": len(ids),
        "prompt_length": length,
        "cut": len(ids) > length,
    }


def prompt_warnings(prompt: RepairedPrompt) -> tuple[str, ...]:
    """Return sentences on what was repaired in a prompt, and on words or places in it that are not understood."""
    warnings = [prompt.describe()] if prompt.repairs else []
    if unclear := _not_understood(prompt.text):
        warnings.append(f"The prompt {prompt.text!r} may not be understood: {unclear}. Name only what to segment.")
    return tuple(warnings)


@lru_cache(1 << 12)
def _not_understood(text: str) -> str:
    return ", ".join(read_prompt(text).not_understood)
