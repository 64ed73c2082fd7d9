"""Tokenizer files that differ from CLIP's are refused before they are passed to the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError, DataError, UsageError
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.prompts import tokenizer as tokens
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
from tests.bundles import linked_copy, replace_text, reseal

CLIP = PromptTokenizer.from_open_clip().to_json()
SMALL = PromptTokenizer(
    {"a": 0, "b": 1, "ab": 2, '"': 3, tokens.START: 4, tokens.END: 5}, [("a", "b")]
).to_json()  # as good as the whole one, and read a thousand times faster
PATH = Path("bundle.cclip/tokenizer.json")
Form = dict[str, Any]


def refusal(content: bytes) -> str:
    """What a tokenizer.json is refused with."""
    with pytest.raises(DataError, match=r"tokenizer\.json is not CLIP's tokenizer") as caught:
        PromptTokenizer.parse(content, PATH)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def field(name: str, value: Any) -> Callable[[Form], None]:
    return lambda form: form.update({name: value})


def model_field(name: str, value: Any) -> Callable[[Form], None]:
    return lambda form: form["model"].update({name: value})


def token(text: str, number: Any) -> Callable[[Form], None]:
    return lambda form: form["model"]["vocab"].update({text: number})


def regex(pattern: str) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        form["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


def renumber(old: str, number: int) -> Callable[[Form], None]:
    def change(form: Form) -> None:
        form["model"]["vocab"][old] = number

    return change


def added(**changes: Any) -> Callable[[Form], None]:
    return lambda form: form["added_tokens"][0].update(changes)


def many_added(form: Form) -> None:
    form["added_tokens"] += [{**form["added_tokens"][0], "id": 60_000 + n, "content": f"x{n}"} for n in range(1000)]


def drop(name: str) -> Callable[[Form], None]:
    return lambda form: form.pop(name)


TEMPLATE = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
    "special_tokens": {"x": {"id": "x", "ids": [10**9], "tokens": ["x"]}},
}  # fmt: skip
PADDING = {
    "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "x",
}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 10}

# What each did before: panics are of pyo3's PanicException, which no `except Exception` catches.
CHANGES: dict[str, tuple[Callable[[Form], None], str]] = {
    "padding to 10**9 ids, which took all memory": (field("padding", PADDING), "padding"),
    "truncation with a stride beyond its length, which panicked": (field("truncation", TRUNCATION), "truncation"),
    "a post-processor with ids beyond the vocabulary": (field("post_processor", TEMPLATE), "post_processor"),
    "a pattern that backtracks, which panicked": (regex("(a+)+$"), "pre_tokenizer"),
    "no pre-tokenizer": (field("pre_tokenizer", None), "pre_tokenizer"),
    "a normalizer that grows every letter": (
        field("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}), "normalizer",
    ),
    "a normalizer of a binary table, which panicked": (field("normalizer", CHARSMAP), "normalizer"),
    "another decoder": (field("decoder", {"type": "Fuse"}), "decoder"),
    "another model": (model_field("type", "WordPiece"), "model.type"),
    "dropout: other ids at each call": (model_field("dropout", 0.5), "model.dropout"),
    "merges that are ignored": (model_field("ignore_merges", True), "model.ignore_merges"),
    "an unknown field": (field("plugin", "/tmp/x.so"), "plugin"),
    "a field that is missing": (drop("decoder"), "decoder"),
    "another version": (field("version", "2.0"), "version"),
    "an id beyond the vocabulary": (token("zzzz", 10**9), "ids are not 0 to"),
    "a negative id": (renumber("a", -1), "ids are not 0 to"),
    "an id twice": (renumber("a", 3), "ids are not 0 to"),
    "an id that is no number": (renumber("a", 0.0), "ids are not 0 to"),  # type: ignore[arg-type]
    "an id that is a truth value": (renumber("\"", True), "ids are not 0 to"),
    "a token that is empty": (token("", 6), "a token is empty"),
    "a token of half a character": (token("\ud800", 6), "characters outside the byte alphabet"),
    "a token of a million letters": (token("a" * 1_000_000, 6), "longer than"),
    "a merge of unknown tokens": (
        lambda form: form["model"]["merges"].append(["a", "\u2603"]), "not in the vocabulary",
    ),
    "a merge of three": (lambda form: form["model"]["merges"].append(["a", "b", "c"]), "not a pair"),
    "merges that are no list": (model_field("merges", {"a": "b"}), "merges are not a list"),
    "no vocabulary": (model_field("vocab", []), "vocabulary is not an object"),
    "an added token of another id": (added(id=7), "added tokens"),
    "an added token that eats white space": (added(lstrip=True), "added tokens"),
    "a thousand added tokens": (many_added, "added tokens"),
    "no added tokens": (field("added_tokens", None), "added tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_whatever_clip_s_tokenizer_does_not_have_is_refused_before_the_library_sees_it(
    change: Callable[[Form], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> Any:
        raise AssertionError("the library was called")

    monkeypatch.setattr(tokens, "Tokenizer", unreachable)
    with pytest.raises(AssertionError, match="the library was called"):
        PromptTokenizer.parse(SMALL.encode(), PATH)
    form = json.loads(SMALL)
    change(form)
    assert reason in refusal(json.dumps(form).encode())


def unigram() -> bytes:
    return str(tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0)).to_str()).encode()


BYTES = {
    "nothing": b"",
    "a number": b"1" * 100_000,
    "no UTF-8": b"\xff\xfe{}",
    "half of it": CLIP.encode()[: len(CLIP) // 2],
    "nested lists": b"[" * 1_000_000,
    "nested objects": b'{"model":' * 200_000,
    "20 MB": b" " * 20_000_000,
    "a list": b"[]",
    "another library's": b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
    "Unigram": unigram(),
}


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES)
def test_a_file_that_is_not_a_tokenizer_is_refused(content: bytes) -> None:
    refusal(content)


def test_what_is_there_twice_is_not_read_in_another_way_by_the_library() -> None:
    """Readers differ in which of two equal keys they take; here the library gets the values that were checked."""
    first = '{"padding": {"strategy": {"Fixed": 1000000000}}, '
    found = PromptTokenizer.parse((first + CLIP[1:]).encode(), PATH)
    assert found.to_json() == CLIP


def test_the_forms_that_are_expected_are_those_that_are_written() -> None:
    """Red where another version of tokenizers writes another form: then both have to be accepted."""
    form = json.loads(CLIP)
    model = form.pop("model")
    del model["vocab"], model["merges"]
    for entry in form.pop("added_tokens"):
        assert entry.items() >= tokens.SPECIAL_FORM.items()
        assert entry.keys() - tokens.SPECIAL_FORM.keys() == {"id", "content"}
    assert (form, model) == (tokens.FORM, tokens.MODEL_FORM)


def test_merges_as_earlier_versions_write_them_are_read() -> None:
    form = json.loads(SMALL)
    form["model"]["merges"] = [" ".join(pair) for pair in form["model"]["merges"]]
    assert PromptTokenizer.parse(json.dumps(form).encode(), PATH).to_json() == SMALL


def test_a_bundle_with_a_hostile_tokenizer_is_refused_when_it_is_opened_to_serve(
    tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = linked_copy(tiny_bundle_path, tmp_path)
    replace_text(copy / "tokenizer.json", CLIP.replace('"padding":null', f'"padding":{json.dumps(PADDING)}'))
    reseal(copy)
    bundle = Bundle.open(copy)
    with pytest.raises(DataError, match="padding differ"):
        Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.mark.parametrize("backend", [OnnxRuntimeBackend, OpenVinoBackend])
@pytest.mark.parametrize("number", [-1, 49408, 2**31, 2**62])
def test_ids_outside_the_vocabulary_do_not_reach_a_backend(tiny_bundle: Bundle, backend: Any, number: int) -> None:
    """Before: a traceback from ONNX Runtime, and an answer from OpenVINO."""
    row = np.zeros(24, np.int64)
    row[:3] = 49406, number, 49407
    with pytest.raises(UsageError, match=r"Token ids range from .*; .* allows 0 to 49407"):
        Segmenter.of_bundle(tiny_bundle, backend(tiny_bundle, threads=1)).encode_tokens([row])


@pytest.mark.parametrize("size", [49407, 0, -5, "many", None])
def test_a_network_with_fewer_tokens_than_the_tokenizer_is_refused(
    tiny_bundle_path: Path, tmp_path: Path, size: Any
) -> None:
    copy = linked_copy(tiny_bundle_path, tmp_path)
    reseal(copy, lambda manifest: manifest["model"].update(vocabulary_size=size))
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"tokenizer of 49408 tokens and a network of"):
        Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, threads=1))
