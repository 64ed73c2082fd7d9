"""Evaluate a network on a split: one pass per image for its own prompts and all control prompts.

Only metrics are kept of each image, so memory does not grow with the size of the split.
"""

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
from cclip_deploy.datasets.sample import Sample
from cclip_deploy.errors import DataError
from cclip_deploy.evaluation.controls import Control
from cclip_deploy.evaluation.metrics import (
    BoundaryMetrics,
    Mask,
    Overlap,
    ProbabilityHistogram,
    measure_boundary,
    measure_overlap,
    probability_histogram,
)
from cclip_deploy.evaluation.models import EvaluatedModel
from cclip_deploy.imaging.reading import failure_of, read_image
from cclip_deploy.inference.prompt_cache import Tokens
from cclip_deploy.prompts.tokenizer import PromptTokenizer

PREFETCHED_IMAGES = 2
Floats = NDArray[np.float32]
OnImage = Callable[[Path, int, int], None]
"""Called before each image with its path, its number from 1, and the number of images."""


@dataclass(frozen=True)
class MeasurementOptions:
    """Threshold, boundary tolerance, and handling of failures."""

    threshold: float
    tolerance_px: float
    worst: int
    """Number of predicted masks to keep of the worst cases."""
    leave_out_failures: bool = False
    """Skip images that cannot be read with their masks, instead of raising the error."""


@dataclass(frozen=True)
class ControlMetrics:
    """Metrics of a row under a control, averaged over the control's prompts by weight."""

    dice: float
    iou_with_own: float
    """IoU of the predictions for the control's and the row's own prompt."""


@dataclass(frozen=True)
class MeasuredRow:
    """Metrics of one row; `boundary` is None if the prediction or the reference is empty."""

    overlap: Overlap
    boundary: BoundaryMetrics | None
    histogram: ProbabilityHistogram
    pixels: int
    cut: bool
    controls: Mapping[str, ControlMetrics]


@dataclass(frozen=True)
class ExampleCase:
    """A predicted mask to show in the report, stored as packed bits."""

    row: int
    packed: NDArray[np.uint8]
    hw: tuple[int, int]

    def mask(self) -> Mask:
        """Return the predicted mask, (H, W)."""
        return np.unpackbits(self.packed, count=self.hw[0] * self.hw[1]).reshape(self.hw).astype(np.bool_)


class TopCases:
    """The `count` cases of highest score; of equal scores the first rows. Holds at most `count` masks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, ExampleCase]] = []

    def add(self, row: int, score: float, mask: Mask) -> None:
        """Add a mask if its score is among the highest."""
        key = (score, -row)
        full = len(self._heap) >= self._count
        if self._count and (not full or key > self._heap[0][:2]):
            push = heapq.heappushpop if full else heapq.heappush
            push(self._heap, (*key, ExampleCase(row, np.packbits(mask), (mask.shape[0], mask.shape[1]))))

    def cases(self) -> tuple[ExampleCase, ...]:
        """Return the cases, highest score first."""
        return tuple(case for _, _, case in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


@dataclass(frozen=True)
class Measurements:
    """Metrics of a split in the order of its samples, without the rows of failed images, and cases to show."""

    rows: tuple[MeasuredRow, ...]
    worst: tuple[ExampleCase, ...]
    """Rows with a target and the lowest Dice."""
    false_positives: tuple[ExampleCase, ...]
    """Rows without a target and the largest predictions."""
    sample_indices: tuple[int, ...]
    """For each of `rows`, the index of its sample."""
    failed: tuple[tuple[Path, str], ...]
    """Skipped images, each with the reason."""


@dataclass(frozen=True)
class ControlPrompt:
    """A control's prompt for a row, and its weight among the control's prompts for that row."""

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
    options: MeasurementOptions,
    on_image: OnImage = lambda path, number, total: None,
) -> Measurements:
    """Run a network on every row and control prompt of a split, and measure its masks.

    A thread loads a few images ahead. Memory holds the masks of one image's rows, `PREFETCHED_IMAGES` further images,
    and about 1 kB per row.

    Raises:
        DataError: a prompt has no word, a mask has more than two values, or the masks of one image are too large.
        ImageError: an image or mask cannot be decoded. With `leave_out_failures`, errors of a single image are not
            raised but listed in `failed`.
    """
    tokens, cut = encode_texts([sample.text for sample in samples], network.tokenizer, network.prompt_length)
    control_texts = {text for control in controls for row in control.prompts for text in row}
    control_tokens = {text: network.tokenizer.encode_cut(text, network.prompt_length) for text in control_texts}
    rows_of: dict[Path, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        rows_of[sample.image].append(row)
    measured: dict[int, MeasuredRow] = {}
    failed: dict[Path, str] = {}
    worst, false_positives = TopCases(options.worst), TopCases(options.worst)
    for number, (image, loading) in enumerate(_prefetch(samples, rows_of), 1):
        on_image(image, number, len(rows_of))
        try:
            loaded = loading.result()
        except Exception as error:  # decoders raise many types for damaged files
            if not options.leave_out_failures:
                raise
            failed[image] = failure_of(image, error)
            continue
        evaluation = _ImageEvaluation(loaded, {row: samples[row].mask for row in rows_of[image]}, options)
        own = {row: tokens[row] for row in rows_of[image]}
        prompts = [
            ControlPrompt(row, control.name, control_tokens[text], weight)
            for control in controls
            for row in own
            for text, weight in control.prompts[row].items()
        ]
        evaluation.run(network, own, prompts)
        for row in own:
            measured[row] = evaluation.measure(row, cut[row])
            overlap = measured[row].overlap
            if overlap.reference:
                worst.add(row, -overlap.dice, evaluation.predicted[row])
            elif overlap.predicted:
                false_positives.add(row, overlap.predicted, evaluation.predicted[row])
    indices = tuple(sorted(measured))
    places = {row: place for place, row in enumerate(indices)}

    def renumbered(cases: TopCases) -> tuple[ExampleCase, ...]:
        return tuple(replace(case, row=places[case.row]) for case in cases.cases())

    rows = tuple(measured[row] for row in indices)
    return Measurements(rows, renumbered(worst), renumbered(false_positives), indices, tuple(failed.items()))


class _ImageEvaluation:
    """Predictions and metrics of one image. Only this object holds the masks of all rows of the image."""

    def __init__(self, loaded: _Loaded, masks: Mapping[int, Path], options: MeasurementOptions) -> None:
        self.pixels, self.options = loaded.pixels, options
        self.references = {row: loaded.references[mask] for row, mask in masks.items()}
        self.predicted: dict[int, Mask] = {}
        self._histograms: dict[int, ProbabilityHistogram] = {}
        self._controls: dict[int, dict[str, ControlMetrics]] = {row: {} for row in masks}

    def run(self, network: EvaluatedModel, own: Mapping[int, Tokens], prompts: Sequence[ControlPrompt]) -> None:
        """Run each distinct prompt once; the rows' own prompts first, because controls are compared with them."""
        controls_of: dict[bytes, list[ControlPrompt]] = defaultdict(list)
        for prompt in prompts:
            controls_of[prompt.tokens.tobytes()].append(prompt)
        control_tokens = {prompt.tokens.tobytes(): prompt.tokens for prompt in prompts}
        distinct = {tokens.tobytes(): tokens for tokens in own.values()} | control_tokens
        own_keys = {tokens.tobytes() for tokens in own.values()}
        own_masks: dict[bytes, Mask] = {}
        for key, probability in zip(distinct, network.answer(self.pixels, list(distinct.values())), strict=True):
            mask = probability >= self.options.threshold
            if key not in own_keys:
                self._add_controls(mask, controls_of[key])
                continue
            own_masks[key] = mask
            for row in (row for row, tokens in own.items() if tokens.tobytes() == key):
                self.predicted[row] = mask
                self._histograms[row] = probability_histogram(probability, self.references[row])
            if len(own_masks) == len(own_keys):
                for own_key, own_mask in own_masks.items():
                    self._add_controls(own_mask, controls_of[own_key])

    def _add_controls(self, mask: Mask, prompts: Sequence[ControlPrompt]) -> None:
        for prompt in prompts:
            row, controls = prompt.row, self._controls[prompt.row]
            before = controls.get(prompt.control, ControlMetrics(0.0, 0.0))
            dice = measure_overlap(mask, self.references[row]).dice
            iou = measure_overlap(mask, self.predicted[row]).iou
            controls[prompt.control] = ControlMetrics(
                before.dice + prompt.weight * dice, before.iou_with_own + prompt.weight * iou
            )

    def measure(self, row: int, cut: bool) -> MeasuredRow:
        """Return the metrics of a row after `run`."""
        mask, reference = self.predicted[row], self.references[row]
        return MeasuredRow(
            overlap=measure_overlap(mask, reference),
            boundary=measure_boundary(mask, reference, self.options.tolerance_px),
            histogram=self._histograms[row],
            pixels=reference.size,
            cut=cut,
            controls=self._controls[row],
        )


def encode_texts(texts: Sequence[str], tokenizer: PromptTokenizer, length: int) -> tuple[list[Tokens], list[bool]]:
    """Return token rows (L,), and whether each prompt was truncated; raise DataError if a prompt has no word."""
    counts = {text: len(tokenizer.ids(text)) for text in set(texts)}
    for text in sorted(text for text, count in counts.items() if count == 2):
        raise DataError(f"The prompt {text!r} holds no word. Fill it in, or remove the row.")
    rows = {text: tokenizer.encode_cut(text, length) for text in counts}
    return [rows[text] for text in texts], [counts[text] > length for text in texts]


def _prefetch(
    samples: Sequence[Sample], rows_of: Mapping[Path, Sequence[int]]
) -> Iterator[tuple[Path, Future[_Loaded]]]:
    """Yield each image with its masks, loaded ahead by a thread."""
    reader = ThreadPoolExecutor(1, "cclip-reader")
    pending: deque[tuple[Path, Future[_Loaded]]] = deque()
    try:
        for image, rows in rows_of.items():
            pending.append((image, reader.submit(_load, image, [samples[row] for row in rows])))
            if len(pending) > PREFETCHED_IMAGES:
                yield pending.popleft()
        yield from pending
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def _load(image: Path, samples: Sequence[Sample]) -> _Loaded:
    pixels = read_image(image).pixels
    height, width = pixels.shape[:2]
    if len(samples) * height * width > MOST_MASK_BYTES:
        raise DataError(
            f"{image} has {len(samples)} rows, whose masks of {width}x{height} pixels would take more than "
            f"{MOST_MASK_BYTES:,} bytes. Reduce the image and its masks, or give it fewer rows."
        )
    references = {mask: sample.read_mask() for mask, sample in {s.mask: s for s in samples}.items()}
    for mask, reference in references.items():
        if reference.shape != pixels.shape[:2]:
            raise DataError(
                f"Mask {mask} is {reference.shape} (H, W) when decoded, but its image is {pixels.shape[:2]}. "
                "Use the mask of this image."
            )
    return _Loaded(pixels, references)
