"""Parity checks of the stages around the graphs: tokenizer, preprocessing, threshold, and end-to-end masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import DataError, ParityError, PromptError
from cclip_deploy.imaging.preprocess import to_input
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.compare import Check, limits_of, mask_checks
from cclip_deploy.parity.reference import Reference
from cclip_deploy.parity.source import Source, tokenizer_hash, unpack_pixels
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.backend import Backend

INPUT_NOISE = 1e-5
"""Limit of max|a−b|/max|b| of a network input: rounding differences of resizing between processors."""
IDS_SHOWN = 4

Ids = NDArray[np.int64]


def stage_checks(bundle: Bundle, references: Sequence[Reference]) -> Iterator[Check]:
    """Compare a bundle's tokenizer, preprocessing and threshold with those that its references were recorded with.

    References without a source are skipped. The names of the checks start with the stage; `detail` names the sentence,
    field or image that differs.
    """
    for reference in references:
        if (source := reference.source) is None:
            continue
        yield from _tokenizer_checks(bundle, reference, source)
        yield from _preprocessing_checks(bundle, reference, source)
        found, expected = bundle.manifest.threshold, source.threshold
        yield _stage(
            "threshold", "value", [] if found == expected else [f"the bundle has {found}, the checkpoint {expected}"]
        )


def mask_stage_checks(bundle: Bundle, backend: Backend, references: Sequence[Reference]) -> Iterator[Check]:
    """Segment the references' source images like `predict`, and compare the masks at the size of these images."""
    for reference in references:
        if reference.source is not None:
            yield from _mask_checks(bundle, backend, reference, reference.source)


def check_tokenizer_file(bundle: Bundle, reference: PromptTokenizer) -> Check:
    """Compare tokenizer.json field by field with one built from open_clip's tables."""
    try:
        found = json.loads(bundle.tokenizer().to_json())
    except DataError as error:
        return _stage("tokenizer", "fields", [str(error)])
    expected = json.loads(reference.to_json())
    found |= {f"model.{name}": value for name, value in found.pop("model").items()}
    expected |= {f"model.{name}": value for name, value in expected.pop("model").items()}
    fields = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return _stage("tokenizer", "fields", [f"{name} of tokenizer.json differs from open_clip's" for name in fields])


def _mask_checks(bundle: Bundle, backend: Backend, reference: Reference, source: Source) -> Iterator[Check]:
    prompts = source.sentences[: len(reference.tokens)]
    graph, name = "chain", f"chain/{reference.name}/masks"
    limits = limits_of(backend.precision, reference.name)
    try:
        segmenter = Segmenter.of_bundle(bundle, backend)
        pictures = [unpack_pixels(picture) for picture in source.pictures[: len(source.masks)]]
        found = [np.stack(list(segmenter.probabilities(picture, prompts))) for picture in pictures]
    except (DataError, ParityError, PromptError) as error:
        yield Check(name, graph, backend.name, backend.precision, "flipped_share", 1.0, 0.0, False, str(error))
        return
    for number, (probabilities, expected) in enumerate(zip(found, source.masks, strict=True)):
        masks = probabilities >= bundle.manifest.threshold
        yield from mask_checks(f"{name}/{number}", graph, backend, masks[None], expected[None], limits)


def _tokenizer_checks(bundle: Bundle, reference: Reference, source: Source) -> Iterator[Check]:
    try:
        tokenizer = bundle.tokenizer()
    except DataError as error:
        yield _stage("tokenizer", "ids", [str(error)])
        return
    faults = [
        fault
        for sentence, row in zip(source.sentences, source.ids, strict=True)
        if (fault := _ids_fault(tokenizer, sentence, row))
    ]
    faults += _row_faults(tokenizer, reference, source)
    yield _stage("tokenizer", "ids", faults)
    known = tokenizer_hash(tokenizer) == source.vocabulary_sha256
    yield _stage("tokenizer", "vocabulary", [] if known else ["vocabulary or merges differ from open_clip's"])


def _ids_fault(tokenizer: PromptTokenizer, sentence: str, row: Ids) -> str | None:
    ids = tokenizer.ids(sentence)
    expected = [int(number) for number in np.trim_zeros(row, "b")]
    if ids == expected:
        return None
    place = next(
        (n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected))
    )
    found, truth = _shown(ids[place:]), _shown(expected[place:])
    return f"sentence {sentence!r} has ids {found} from token {place} on, expected {truth}"


def _row_faults(tokenizer: PromptTokenizer, reference: Reference, source: Source) -> Iterator[str]:
    """Compare the token rows that `predict` computes, padded to the graph's length."""
    length = reference.tokens.shape[1]
    for sentence, expected in zip(source.sentences, reference.tokens, strict=False):
        try:
            row = tokenizer.encode(sentence, length)
        except PromptError as error:
            yield f"sentence {sentence!r}: {error}"
            continue
        if not np.array_equal(row, expected):
            yield f"sentence {sentence!r} has tokens {_shown(row)}, expected {_shown(expected)}"


def _preprocessing_checks(bundle: Bundle, reference: Reference, source: Source) -> Iterator[Check]:
    own, trained = bundle.manifest.preprocessing.model_dump(), source.preprocessing.model_dump()
    for field in own:
        same = own[field] == trained[field]
        fault = f"the bundle has {_plain(own[field])}, the checkpoint {_plain(trained[field])}"
        yield _stage("preprocessing", field, [] if same else [fault])
    expected = [*reference.image, *source.probe_inputs]
    for number, (picture, truth) in enumerate(zip(source.pictures, expected, strict=True)):
        found = to_input(unpack_pixels(picture), bundle.manifest.image_hw, bundle.manifest.preprocessing)[0]
        error = float(np.abs(found - truth).max() / np.abs(truth).max())
        detail = None if error <= INPUT_NOISE else f"network input of image {number}, {picture.shape}"
        yield Check(
            f"preprocessing/{reference.name}/input/{number}", "preprocessing", "bundle", "all", "input_error", error,
            INPUT_NOISE, error <= INPUT_NOISE, detail,
        )  # fmt: skip


def _stage(stage: str, part: str, faults: list[str]) -> Check:
    more = f" ({len(faults)} faults)" if len(faults) > 1 else ""
    detail = f"{faults[0]}{more}" if faults else None
    return Check(f"{stage}/{part}", stage, "bundle", "all", "differences", len(faults), 0.0, not faults, detail)


def _shown(ids: Ids | list[int]) -> str:
    numbers = [int(number) for number in ids]
    return " ".join(map(str, numbers[:IDS_SHOWN])) + (" \u2026" if len(numbers) > IDS_SHOWN else "")


def _plain(value: object) -> str:
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
