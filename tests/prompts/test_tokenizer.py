"""Token ids are equal to those of open_clip."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer

from cclip_deploy.errors import DataError, PromptError
from cclip_deploy.prompts.tokenizer import PromptTokenizer, clean_prompt

OPEN_CLIP = SimpleTokenizer()
TOKENIZER = PromptTokenizer.from_open_clip()
PROMPTS = {
    "plain": "small polyp in the upper left corner",
    "upper case": "Bilateral pulmonary INFECTION, Two Infected Areas, ALL Left Lung",
    "accents": "Infiltração no pulmão, lésion à l'œil, Tumorgröße: ÜBER ﬁve naïve",
    "decomposed accents": "le\u0301sion",
    "mojibake": "lÃ©sion dans lâ€™hÃ©misphÃ¨re",
    "curly quotes": "the patient’s “left” lung – lower lobe…",
    "contractions": "it's the lung's, we've they're I'm don't you'll he'd IT'S",
    "punctuation": "lung (left/right)?! [a] {b} 3.5x4.2cm; <5 % ~ #1 @x a_b __init__ ***",
    "numbers": "T2-weighted 1999 ½ ² Ⅷ ٣",
    "entities": "nodule &lt; 3 mm &amp; calcified",
    "entities twice": "nodule &amp;lt; 3 mm &amp;amp; calcified &#x41;&eacute;",
    "entities beside a tag, which ftfy leaves": "<b>nodule</b> &amp;lt; 3 mm",
    "white space": "  lower \t left\n\nlung\u00a0\u3000 x\x1cy\x85z ",
    "emoji": "polyp 😀👩‍🔬🇩🇪 here",
    "chinese, japanese, korean": "左下肺叶 腫瘍 폐 결절",
    "right to left": "ورم في الرئة גידול",
    "greek sigma, turkish i": "ΟΔΟΣ İstanbul ıI",
    "control characters": "lung\x00\x07\u200b\ufeffleft",
    "special tokens": "lung <end_of_text> left <START_OF_TEXT>x<|endoftext|>",
    "long s": "'ſ it'ſ <ſtart_of_text> ﬅ",
    "iota below": "a\u0345b \u1fb3",
    "one word of many letters": "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "over-long": "lower left lung " * 50,
    "nothing but punctuation": "!!!",
    "empty": "",
    "blank": " \n\t",
}
# What Python's Unicode tables know; newer characters are letters to open_clip and none yet to tokenizers.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])


def theirs(prompt: str) -> list[int]:
    return [OPEN_CLIP.sot_token_id, *OPEN_CLIP.encode(prompt), OPEN_CLIP.eot_token_id]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_ids_are_open_clip_s(prompt: str) -> None:
    assert TOKENIZER.ids(prompt) == theirs(prompt)


@settings(max_examples=25, deadline=None)
@given(st.text(KNOWN, max_size=60))
@example("'ſſ'S")
@example("a\u0345\u0345'\u0345s")
def test_ids_of_any_text_are_open_clip_s(prompt: str) -> None:
    assert TOKENIZER.ids(prompt) == theirs(prompt)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["&amp;", "Ã©", "’", "'s", " <end_of_text>", "LUNG", "3", ".", "é", " "]), max_size=12))
def test_ids_of_any_mixture_of_troublesome_pieces_are_open_clip_s(pieces: list[str]) -> None:
    prompt = "".join(pieces)
    assert TOKENIZER.ids(prompt) == theirs(prompt)


def test_every_character_that_python_knows_is_split_as_open_clip_splits_it() -> None:
    """One in seven of the 140,000, letters before and after, so that a wrong class shows."""
    known = [chr(code) for code in range(0, 0x110000, 7) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    split = TOKENIZER._tokenizer.pre_tokenizer
    for first in range(0, len(known), 50):
        text = " ".join(f"a{character}b1{character}!{character}" for character in known[first : first + 50]).lower()
        expected = ["".join(OPEN_CLIP.byte_encoder[b] for b in word.encode()) for word in OPEN_CLIP.pat.findall(text)]
        assert [word for word, _ in split.pre_tokenize_str(text)] == expected


def test_the_file_gives_the_same_ids_again() -> None:
    again = PromptTokenizer.parse(TOKENIZER.to_json().encode(), Path("tokenizer.json"))
    assert again.to_json() == TOKENIZER.to_json()
    assert (again.start_id, again.end_id) == (49406, 49407)
    assert [again.ids(prompt) for prompt in PROMPTS.values()] == [theirs(prompt) for prompt in PROMPTS.values()]


@pytest.mark.parametrize("name", ["plain", "upper case", "punctuation", "numbers", "chinese, japanese, korean"])
def test_the_file_alone_lowers_and_splits_as_open_clip_does(name: str) -> None:
    """For runtimes that read the file without our cleaning, Triton's preprocessing say."""
    alone = Tokenizer.from_str(TOKENIZER.to_json())
    assert alone.encode(PROMPTS[name], add_special_tokens=False).ids == OPEN_CLIP.encode(PROMPTS[name])


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  Lower\tLEFT\n lung ", "lower left lung"),
        ("a &amp;lt; b", "a < b"),
        ("<i> a &amp;lt; b", "<i> a < b"),
        ("lÃ©sion", "lésion"),
        ("&nbsp;", ""),
    ],
)
def test_cleaning_repairs_resolves_folds_and_lowers(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


def test_row_has_start_words_end_and_zeros() -> None:
    row = TOKENIZER.encode("lower left lung", 8)
    assert (row.dtype.name, row.shape) == ("int64", (8,))
    assert row.tolist() == [*theirs("lower left lung"), 0, 0, 0]


def test_row_that_just_fits_ends_with_the_end_token() -> None:
    assert TOKENIZER.encode("lower left lung", 5).tolist() == theirs("lower left lung")


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "&nbsp;", "\u0345"])
def test_a_prompt_without_a_single_token_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="The prompt is empty"):
        TOKENIZER.encode(prompt, 32)


def test_an_over_long_prompt_is_refused_with_both_lengths_and_never_cut() -> None:
    with pytest.raises(
        PromptError, match=r"takes 5 tokens and the graph has room for 4: .*--prompt-length 5 \(at most"
    ):
        TOKENIZER.encode("lower left lung", 4)
    with pytest.raises(PromptError, match="--prompt-length 77"):
        TOKENIZER.encode("lung " * 100, 32)


@pytest.mark.parametrize("length", [3, 5, 32, 77])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_cutting_is_open_clip_s(prompt: str, length: int) -> None:
    assert TOKENIZER.encode_cut(prompt, length).tolist() == OPEN_CLIP([prompt], length)[0].tolist()


@pytest.mark.parametrize("content", ["", "{", "[]", "hello", '{"version": "1.0"}'])
def test_a_file_that_is_not_a_tokenizer_is_a_data_error(content: str) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json is not CLIP's tokenizer: .*Export the bundle again"):
        PromptTokenizer.parse(content.encode(), Path("tokenizer.json"))


def test_the_file_is_plain_json_with_clip_s_49408_tokens() -> None:
    content = json.loads(TOKENIZER.to_json())
    assert len(content["model"]["vocab"]) == 49408
    assert len(content["model"]["merges"]) == 48894
