"""Malicious sentences are processed in linear time, or refused with one of the project's errors.

Before issue 10 a word of 60 letters hung every command that repairs prompts (45 letters: 3.8 s). After it, a million
characters were still cleaned and tokenized, and `²` before "lesions" and `&#99…9;` of 5,000 digits gave tracebacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cclip_deploy.common.limits import LONGEST_PROMPT
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.errors import DataError, PromptError
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.prompts import spelling
from cclip_deploy.prompts.reader import meaning, mirror, read_prompt
from cclip_deploy.prompts.spelling import repair_prompt, repair_prompts, respell
from cclip_deploy.prompts.tokenizer import PromptTokenizer, clean_prompt
from tests.attacks.steps import counted_lines
from tests.attacks.test_hostile_masks import pair, write_set
from tests.cli.run import invoke

STEPS_AT_MOST, STEPS_PER_LETTER = 10_000, 60
"""Three times what 300 rows of 1 to 5 of these words took at most: 20 steps a letter."""
NAMES = "left right upper middle lower lung lungs all both bilateral RUL L zone zones two no and of the"
WORDS = [*NAMES.split(), *"2²,.;&-()x"]


def steps_of(function: Callable[[str], object], text: str) -> int:
    spelling.respell.cache_clear()
    with counted_lines() as steps:
        function(text)
    return steps[0]


@given(st.text("loweruptighbca", min_size=30, max_size=60))
@example("loweruppermiddle" * 3 + "z")
@example("lower" * 12)
@example("left" * 11 + "x")
@example("all" * 19 + "q")
@example("and" * 20)
@settings(deadline=None, max_examples=60)
def test_a_word_takes_steps_in_proportion_to_its_letters(word: str) -> None:
    """Before, each place was tried again from each way to reach it: 2 to the number of words."""
    assert steps_of(respell, word) < 2000 + 60 * len(word)


@pytest.mark.parametrize("known", sorted(spelling.KNOWN))
def test_every_known_word_run_together_takes_linear_steps(known: str) -> None:
    for count in (60 // len(known) // 2, 60 // len(known)):
        assert steps_of(respell, known * count + "z") < 2000 + 60 * 60


FUNCTIONS = (repair_prompt, read_prompt, mirror, meaning)


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=250))
@example(["upper", "left"] * 20)
@example(["upper", ","] * 200)
@example(["upper", "zone", "and"] * 60)
@example(["²", "lesions", "in", "left", "lung"])
@example(["①②③", "lesions", "left"])
@settings(deadline=None, max_examples=60)
def test_a_sentence_takes_steps_in_proportion_to_its_letters(parts: list[str]) -> None:
    text = " ".join(parts)
    for function in FUNCTIONS:
        assert steps_of(function, text) < STEPS_AT_MOST + STEPS_PER_LETTER * len(text), function


@pytest.mark.parametrize(
    "unit", ["upper ", "left upper and ", "lowerupper", "&", "&amp;", "x", "Ã©", "e\u0301", "\x1b[0m", "&#"]
)
def test_twice_the_letters_take_at_most_about_twice_the_steps(unit: str) -> None:
    """Of repair, reading and cleaning; ftfy and html too."""
    for function in (*FUNCTIONS, clean_prompt):
        few, many = (steps_of(function, (unit * LONGEST_PROMPT)[:letters]) for letters in (5000, 10_000))
        assert many < 2.2 * few + 2000, function


@given(st.text(max_size=200) | st.text("&#x;0123456789<>ampltg²①", max_size=200))
@settings(deadline=None, max_examples=150)
def test_any_text_is_read_or_refused(tokenizer: PromptTokenizer, text: str) -> None:
    for function in (*FUNCTIONS, tokenizer.ids, lambda text: tokenizer.encode(text, 77)):
        with suppress(PromptError):
            function(text)


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_open_clip()


HUGE = {"long": "x" * (LONGEST_PROMPT + 1), "longer": "left lung " * 100_000, "digits": f"&#{'9' * 5000};"}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_prompt_is_refused_everywhere_in_one_short_line_before_it_is_cleaned(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text = HUGE[kind]
    if kind != "digits":
        monkeypatch.setattr(ftfy, "fix_text", lambda text: pytest.fail("it was cleaned"))
        for function in (repair_prompt, lambda text: repair_prompts([text], repair=False)):
            with pytest.raises(PromptError):
                function(text)
    for function in (clean_prompt, tokenizer.ids, lambda text: tokenizer.encode_cut(text, 32)):
        with pytest.raises(PromptError) as caught:
            function(text)
        assert len(str(caught.value)) < 300


def test_a_data_set_with_a_huge_sentence_names_its_row(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", *pair(8, 8))
    (folder / "table.csv").write_text("image,mask,text\nimage.png,mask.png," + "left lung " * 2000 + "\n")
    with pytest.raises(DataError, match=r"image\.png, split train: The prompt 'left .* characters"):
        read_data_set(folder)
    (folder / "table.csv").unlink()
    row = {"image": "image.png", "mask": "mask.png", "text": "\ud800 left lung"}
    (folder / "table.jsonl").write_text(json.dumps(row))
    assert len(read_data_set(folder).samples) == 1


def test_the_commands_refuse_a_huge_prompt(tiny_bundle_path: Path, tmp_path: Path) -> None:
    image, _ = pair(8, 8)
    image.save(tmp_path / "a.png")
    text = "left lung " * 2000
    for command in (
        ("prompt", text, "--bundle", tiny_bundle_path),
        ("predict", tiny_bundle_path, tmp_path / "a.png", "--prompt", text, "-o", tmp_path / "out"),
        ("predict", tiny_bundle_path, tmp_path / "a.png", "--prompt", text, "--no-repair", "-o", tmp_path / "out"),
    ):
        done = invoke(*command)
        assert done.exit_code == 2
        assert "20,000 characters" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_segmenter_refuses_a_huge_prompt_before_it_computes(tiny_bundle_path: Path) -> None:
    from cclip_deploy.bundle.bundle import Bundle
    from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

    bundle = Bundle.open(tiny_bundle_path)
    with pytest.raises(PromptError, match="characters"):
        Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, threads=1)).encode_prompts(["x" * 10**6])
