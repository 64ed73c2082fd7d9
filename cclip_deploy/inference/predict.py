"""Predict: pictures and prompts to masks on disk, one image pass a picture; reading and writing happen beside it."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.files import sha256_input, writing_into
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import DataError, ImageError, UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.reading import failure_of, find_images, read_image
from cclip_deploy.imaging.writing import WrittenMask, file_stem, mask_path, mask_source, write_segmentation
from cclip_deploy.inference.explain import Explainer
from cclip_deploy.inference.explanation_plot import write_explanation
from cclip_deploy.inference.prompt_cache import CacheCounts
from cclip_deploy.inference.room import Room
from cclip_deploy.inference.segmenter import Segmenter

READ_AHEAD, WRITE_BEHIND, WRITERS = 2, 4, 2
BYTES_PER_PIXEL = 16
"""Of a mask that is written: its probability and what becomes of it."""
_NICENESS = 10


@dataclass(frozen=True)
class Prediction:
    """One prompt on one picture. Shares and probabilities are in [0, 1], in the picture's own pixels."""

    image: Path
    prompt: str
    area_share: float
    mean_probability: float
    mean_probability_inside: float | None
    written: WrittenMask
    explanation: Path | None = None

    def to_dict(self) -> dict[str, object]:
        """The form of `predict --json`."""
        files = {"mask": self.written.mask, "probability": self.written.probability, "overlay": self.written.overlay}
        if self.explanation is not None:
            files["explanation"] = self.explanation
        return {
            "image": printable(self.image),
            "prompt": self.prompt,
            "files": {what: printable(path) for what, path in files.items()},
            "area_share": self.area_share,
            "mean_probability": self.mean_probability,
            "mean_probability_inside": self.mean_probability_inside,
        }


@dataclass(frozen=True)
class Predictions:
    """What was written, which pictures could not be read, with the reason, and where the prompts' kernels came from."""

    done: tuple[Prediction, ...]
    failed: tuple[tuple[Path, str], ...]
    prompt_counts: CacheCounts


@dataclass(frozen=True)
class PredictOptions:
    """How masks are made and written.

    Attributes:
        threshold: probability from which a pixel counts, between 0 and 1; None is the bundle's own.
        replace: masks of other pictures may be replaced.
        explainer: draws an explanation beside every mask.
    """

    threshold: float | None = None
    replace: bool = False
    explainer: Explainer | None = None


def predict(
    segmenter: Segmenter,
    images: Sequence[Path],
    prompts: Sequence[str],
    output: Path,
    options: PredictOptions = PredictOptions(),
    on_picture: Callable[[Path, int, int], None] = lambda path, number, total: None,
) -> Predictions:
    """Segment every prompt on every picture; a picture that cannot be used is reported and the rest go on.

    One thread reads a few pictures ahead and two write behind, while this one runs the network. At most
    `READ_AHEAD` pictures wait to be segmented and `WRITE_BEHIND` masks to be written, whatever the number of pictures
    and prompts, and fewer where they are so large that they pass `MOST_PICTURE_BYTES`. Whatever reading a picture
    raises, and a lack of memory afterwards, is that picture's failure. Results have the order of the pictures and
    prompts. `on_picture` is called with each picture, its number and how many there are, when its turn comes.
    No other run can write into the output meanwhile. Masks of the same picture file are replaced, and those of another
    one only where `options.replace`.

    Raises:
        UsageError: no prompt, an output that is a file, or that holds masks of another picture under the same name.
        TargetInUse: another run writes into the output.
        ImageError: a picture does not exist, or a folder holds none.
        PromptError: a prompt is empty or too long, before anything is written.
        EnvironmentIssue: the output cannot be written; what was written before is whole.
    """
    if options.threshold is not None and not 0 < options.threshold < 1:
        raise UsageError(
            f"A threshold of {options.threshold} is not between 0 and 1. Leave it out for the bundle's own."
        )
    check_writable(output)
    with writing_into(output):
        paths = find_images(images)
        used: set[str] = set()
        stems = {path: [file_stem(path, prompt, used) for prompt in prompts] for path in paths}
        if not options.replace:
            _refuse_other_pictures(output, stems)
        return _predict(segmenter, stems, prompts, output, options, on_picture)


def _predict(
    segmenter: Segmenter,
    stems: Mapping[Path, Sequence[str]],
    prompts: Sequence[str],
    output: Path,
    options: PredictOptions,
    on_picture: Callable[[Path, int, int], None],
) -> Predictions:
    counted_before = segmenter.prompt_counts
    segmenter.prepare(prompts)
    limit = segmenter.bundle.manifest.threshold if options.threshold is None else options.threshold
    run, found = _Run(segmenter, stems, prompts, output, limit, options.explainer), _Found()
    with _threads(WRITERS, "writer") as writers, _threads(1, "reader") as reader, closing(Room()) as room:
        for number, (path, read) in enumerate(_read_ahead(reader, list(stems), room), start=1):
            on_picture(path, number, len(stems))
            try:
                picture = read.result()
            except Exception as error:  # whatever a decoder raises on a stranger's bytes
                found.fail(path, error)
                continue
            at_once = room.most_bytes // (BYTES_PER_PIXEL * picture.pixels[..., :1].size)
            try:
                for write in run.masks(picture):
                    found.writing.append((path, writers.submit(write)))
                    found.collect(min(WRITE_BEHIND, max(0, at_once - 1)))
            except MemoryError as error:
                found.fail(path, error)
            room.give(picture.pixels.nbytes)
        found.collect(0)
    counts = segmenter.prompt_counts.since(counted_before)
    return Predictions(tuple(found.done), tuple(found.failed.items()), counts)


@dataclass
class _Run:
    """What is segmented and written, the same for every picture."""

    segmenter: Segmenter
    stems: Mapping[Path, Sequence[str]]
    prompts: Sequence[str]
    output: Path
    limit: float
    explainer: Explainer | None

    def masks(self, picture: Picture) -> Iterator[Callable[[], Prediction]]:
        """For each prompt what writes its mask; the network runs here."""
        seen = None if self.explainer is None else self.explainer.look(picture.pixels)
        features = None if seen is None else seen.features
        probabilities = self.segmenter.probabilities(picture.pixels, self.prompts, features)
        for prompt, probability, stem in zip(self.prompts, probabilities, self.stems[picture.path], strict=True):
            explanation = None
            if self.explainer is not None and seen is not None:
                answer = self.explainer.confounding_answer(prompt)
                path, inside = self.output / f"{stem}-explanation.png", probability >= self.limit
                explanation = write_explanation(path, picture.pixels, inside, prompt, seen, answer)
            yield partial(_write, picture, prompt, probability, self.output, stem, self.limit, explanation)


@dataclass
class _Found:
    """Results and failures so far, and the masks that are being written."""

    done: list[Prediction] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    writing: deque[tuple[Path, Future[Prediction]]] = field(default_factory=deque)

    def collect(self, most: int) -> None:
        """Take the oldest results, waiting until at most so many are under way; raises what a writer raised."""
        while len(self.writing) > most:
            path, future = self.writing.popleft()
            try:
                self.done.append(future.result())
            except MemoryError as error:
                self.fail(path, error)

    def fail(self, path: Path, error: Exception) -> None:
        """Keep the first reason why a picture failed."""
        self.failed.setdefault(path, failure_of(path, error))


def refuse_failures(predictions: Predictions) -> None:
    """ImageError that tells of the pictures that could not be read, if there were any."""
    if not predictions.failed:
        return
    (path, reason), count = predictions.failed[0], len(predictions.failed)
    if count == 1 and not predictions.done:
        raise ImageError(reason)
    raise ImageError(
        f"{count} of {count + len({p.image for p in predictions.done})} pictures could not be used "
        f"(the others are done); first: {path}: {reason}"
    )


def _refuse_other_pictures(output: Path, stems: Mapping[Path, Sequence[str]]) -> None:
    """UsageError where masks that are there already are of another picture, or do not say of which."""
    for path, names in stems.items():
        there = [mask for mask in (mask_path(output, name) for name in names) if mask.exists()]
        try:
            sha256 = sha256_input(path) if there else ""
        except DataError:  # a picture that cannot be read has no masks to write
            continue
        for mask in there:
            source = _source_of(mask)
            if source != sha256:
                said = "does not say what picture it is of" if source is None else "is of another picture"
                raise UsageError(
                    f"{mask} is there and {said}; the mask of {path} would replace it. Choose another output folder, "
                    "or give --force to replace it."
                )


def _source_of(mask: Path) -> str | None:
    try:
        return mask_source(mask)
    except ImageError:
        return None


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone when the block ends: what they have begun is finished, what waits is dropped."""
    pool = ThreadPoolExecutor(count, f"cclip-{name}", initializer=_step_back)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _step_back() -> None:
    """Leave the cores to the network's threads, which wait for each other: one that is delayed delays all."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own to lower
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _read_ahead(
    reader: ThreadPoolExecutor, paths: Sequence[Path], room: Room
) -> Iterator[tuple[Path, Future[Picture]]]:
    """Each path with its picture, which the reader begins a little before it is needed, as far as there is room."""

    def read(path: Path) -> Picture:
        picture = replace(read_image(path), sha256=sha256_input(path))
        room.take(picture.pixels.nbytes)
        return picture

    ahead: deque[tuple[Path, Future[Picture]]] = deque()
    for path in paths:
        ahead.append((path, reader.submit(read, path)))
        if len(ahead) > READ_AHEAD:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _write(
    picture: Picture,
    prompt: str,
    probability: NDArray[np.float32],
    output: Path,
    stem: str,
    threshold: float,
    explanation: Path | None = None,
) -> Prediction:
    inside = probability >= threshold
    return Prediction(
        image=picture.path,
        prompt=prompt,
        area_share=float(inside.mean()),
        mean_probability=float(probability.mean()),
        mean_probability_inside=float(probability[inside].mean()) if inside.any() else None,
        written=write_segmentation(picture, prompt, probability, output, stem, threshold),
        explanation=explanation,
    )
