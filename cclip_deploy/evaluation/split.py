"""The pass over a split: every picture once, for its own prompts and all controls, and only numbers are kept of it."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.limits import MOST_MASK_BYTES
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.errors import DataError
from cclip_deploy.evaluation.controls import Control
from cclip_deploy.evaluation.metrics import (
    Levels,
    Mask,
    Outlines,
    Overlap,
    count_levels,
    measure_outlines,
    measure_overlap,
)
from cclip_deploy.evaluation.models import EvaluatedModel
from cclip_deploy.imaging.reading import failure_of, read_image
from cclip_deploy.inference.prompt_cache import Tokens
from cclip_deploy.prompts.tokenizer import PromptTokenizer

READ_AHEAD = 2
Floats = NDArray[np.float32]
OnImage = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, and how."""

    threshold: float
    tolerance_px: float
    worst: int
    """How many of the worst predictions are kept as masks."""
    leave_out_failures: bool = False
    """Go on without the rows of a picture that cannot be read with its masks; else its error is raised."""


@dataclass(frozen=True)
class ControlAnswer:
    """A row with a control's sentences, averaged by their weights: against its reference, and its own prediction."""

    dice: float
    iou_with_own: float


@dataclass(frozen=True)
class MeasuredRow:
    """All numbers of one row; `outlines` is None where prediction or reference is empty."""

    overlap: Overlap
    outlines: Outlines | None
    levels: Levels
    pixels: int
    cut: bool
    controls: Mapping[str, ControlAnswer]


@dataclass(frozen=True)
class ShownCase:
    """A prediction that is worth looking at; `packed` is the mask as bits."""

    row: int
    packed: NDArray[np.uint8]
    hw: tuple[int, int]

    def mask(self) -> Mask:
        """The predicted mask (H, W)."""
        return np.unpackbits(self.packed, count=self.hw[0] * self.hw[1]).reshape(self.hw).astype(np.bool_)


class Worst:
    """The rows of highest badness so far, of equal ones the first; memory for no more than `most` masks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[float, int, ShownCase]] = []

    def offer(self, row: int, badness: float, mask: Mask) -> None:
        """Keep a mask if it is among the worst."""
        key = (badness, -row)
        full = len(self._kept) >= self._most
        if self._most and (not full or key > self._kept[0][:2]):
            push = heapq.heappushpop if full else heapq.heappush
            push(self._kept, (*key, ShownCase(row, np.packbits(mask), (mask.shape[0], mask.shape[1]))))

    def cases(self) -> tuple[ShownCase, ...]:
        """Worst first."""
        return tuple(case for _, _, case in sorted(self._kept, key=lambda kept: kept[:2], reverse=True))


@dataclass(frozen=True)
class Measurements:
    """A measured split: rows in the order of the samples, and predictions to look at, the worst first.

    `rows` and the cases' numbers leave out the rows of failed pictures; `kept` are the samples' numbers of `rows`.
    """

    rows: tuple[MeasuredRow, ...]
    worst: tuple[ShownCase, ...]
    """Lowest Dice, of the rows that have a target."""
    invented: tuple[ShownCase, ...]
    """Largest predictions, of the rows that have none."""
    kept: tuple[int, ...]
    failed: tuple[tuple[Path, str], ...]
    """Pictures whose rows were left out, and why."""


@dataclass(frozen=True)
class Question:
    """A control's sentence for a row, with its weight among that control's sentences for the row."""

    row: int
    control: str
    tokens: Tokens
    weight: float


@dataclass(frozen=True)
class _Loaded:
    pixels: Floats
    references: dict[Path, Mask]


def measure_split(
    network: EvaluatedModel,
    samples: Sequence[Sample],
    controls: Sequence[Control],
    options: MeasuringOptions,
    on_image: OnImage = lambda path, number, total: None,
) -> Measurements:
    """Ask and measure every row; one thread reads a few pictures ahead.

    Memory holds the masks of one picture's rows, `READ_AHEAD` further pictures, and a kilobyte a row.

    Raises:
        DataError: a text has no word, a mask more than two values, or the masks of one picture would fill the memory.
        ImageError: a picture or mask cannot be decoded. These two, too, are kept in `failed` with
            `leave_out_failures`, as is whatever else reading a picture raises.
    """
    tokens, cut = encode_texts([sample.text for sample in samples], network.tokenizer, network.prompt_length)
    sentences = {text for control in controls for row in control.asked for text in row}
    others = {text: network.tokenizer.encode_cut(text, network.prompt_length) for text in sentences}
    rows_of: dict[Path, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        rows_of[sample.image].append(row)
    measured: dict[int, MeasuredRow] = {}
    failed: dict[Path, str] = {}
    worst, invented = Worst(options.worst), Worst(options.worst)
    for number, (image, loading) in enumerate(_read_ahead(samples, rows_of), 1):
        on_image(image, number, len(rows_of))
        try:
            loaded = loading.result()
        except Exception as error:  # whatever a decoder raises on a stranger's bytes
            if not options.leave_out_failures:
                raise
            failed[image] = failure_of(image, error)
            continue
        picture = _Picture(loaded, {row: samples[row].mask for row in rows_of[image]}, options)
        own = {row: tokens[row] for row in rows_of[image]}
        questions = [
            Question(row, control.name, others[text], weight)
            for control in controls
            for row in own
            for text, weight in control.asked[row].items()
        ]
        picture.ask(network, own, questions)
        for row in own:
            measured[row] = picture.measured(row, cut[row])
            overlap = measured[row].overlap
            if overlap.reference:
                worst.offer(row, -overlap.dice, picture.predicted[row])
            elif overlap.predicted:
                invented.offer(row, overlap.predicted, picture.predicted[row])
    kept = tuple(sorted(measured))
    places = {row: place for place, row in enumerate(kept)}

    def shown(cases: Worst) -> tuple[ShownCase, ...]:
        return tuple(replace(case, row=places[case.row]) for case in cases.cases())

    rows = tuple(measured[row] for row in kept)
    return Measurements(rows, shown(worst), shown(invented), kept, tuple(failed.items()))


class _Picture:
    """One picture while it is measured: the only place where masks of all its rows are in memory."""

    def __init__(self, loaded: _Loaded, masks: Mapping[int, Path], options: MeasuringOptions) -> None:
        self.pixels, self.options = loaded.pixels, options
        self.references = {row: loaded.references[mask] for row, mask in masks.items()}
        self.predicted: dict[int, Mask] = {}
        self._levels: dict[int, Levels] = {}
        self._controls: dict[int, dict[str, ControlAnswer]] = {row: {} for row in masks}

    def ask(self, network: EvaluatedModel, own: Mapping[int, Tokens], questions: Sequence[Question]) -> None:
        """Ask each distinct token row once, the rows' own ones first, as controls are compared with those answers."""
        askers: dict[bytes, list[Question]] = defaultdict(list)
        for question in questions:
            askers[question.tokens.tobytes()].append(question)
        others = {question.tokens.tobytes(): question.tokens for question in questions}
        distinct = {tokens.tobytes(): tokens for tokens in own.values()} | others
        own_keys = {tokens.tobytes() for tokens in own.values()}
        own_answers: dict[bytes, Mask] = {}
        for key, probability in zip(distinct, network.answer(self.pixels, list(distinct.values())), strict=True):
            mask = probability >= self.options.threshold
            if key not in own_keys:
                self._compare(mask, askers[key])
                continue
            own_answers[key] = mask
            for row in (row for row, tokens in own.items() if tokens.tobytes() == key):
                self.predicted[row] = mask
                self._levels[row] = count_levels(probability, self.references[row])
            if len(own_answers) == len(own_keys):
                for own_key, answer in own_answers.items():
                    self._compare(answer, askers[own_key])

    def _compare(self, mask: Mask, questions: Sequence[Question]) -> None:
        for question in questions:
            row, controls = question.row, self._controls[question.row]
            before = controls.get(question.control, ControlAnswer(0.0, 0.0))
            dice = measure_overlap(mask, self.references[row]).dice
            iou = measure_overlap(mask, self.predicted[row]).iou
            controls[question.control] = ControlAnswer(
                before.dice + question.weight * dice, before.iou_with_own + question.weight * iou
            )

    def measured(self, row: int, cut: bool) -> MeasuredRow:
        mask, reference = self.predicted[row], self.references[row]
        return MeasuredRow(
            overlap=measure_overlap(mask, reference),
            outlines=measure_outlines(mask, reference, self.options.tolerance_px),
            levels=self._levels[row],
            pixels=reference.size,
            cut=cut,
            controls=self._controls[row],
        )


def encode_texts(texts: Sequence[str], tokenizer: PromptTokenizer, length: int) -> tuple[list[Tokens], list[bool]]:
    """Token rows (L,), and whether each text had to be cut; DataError where a text has no word."""
    counts = {text: len(tokenizer.ids(text)) for text in set(texts)}
    for text in sorted(text for text, count in counts.items() if count == 2):
        raise DataError(f"The prompt {text!r} holds no word. Fill it in, or remove the row.")
    rows = {text: tokenizer.encode_cut(text, length) for text in counts}
    return [rows[text] for text in texts], [counts[text] > length for text in texts]


def _read_ahead(
    samples: Sequence[Sample], rows_of: Mapping[Path, Sequence[int]]
) -> Iterator[tuple[Path, Future[_Loaded]]]:
    """Each picture with its masks, which a thread begins a little before it is asked for."""
    reader = ThreadPoolExecutor(1, "cclip-reader")
    ahead: deque[tuple[Path, Future[_Loaded]]] = deque()
    try:
        for image, rows in rows_of.items():
            ahead.append((image, reader.submit(_load, image, [samples[row].mask for row in rows])))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
        yield from ahead
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def _load(image: Path, masks: Sequence[Path]) -> _Loaded:
    pixels = read_image(image).pixels
    height, width = pixels.shape[:2]
    if len(masks) * height * width > MOST_MASK_BYTES:
        raise DataError(
            f"{image} has {len(masks)} rows, whose masks of {width}x{height} pixels would take more than "
            f"{MOST_MASK_BYTES:,} bytes. Reduce the picture and its masks, or give it fewer rows."
        )
    references = {mask: read_mask(mask) for mask in set(masks)}
    for mask, reference in references.items():
        if reference.shape != pixels.shape[:2]:
            raise DataError(
                f"Mask {mask} is {reference.shape} (H, W) once decoded, its image {pixels.shape[:2]}. "
                "Give the mask of this very image."
            )
    return _Loaded(pixels, references)
