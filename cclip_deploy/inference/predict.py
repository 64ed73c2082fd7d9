"""Segment image files and write the masks; reading and writing run in threads beside the network."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cclip_deploy.common.files import sha256_input, writing_into
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import CclipError, DataError, ImageError, UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.naming import file_stem, image_names
from cclip_deploy.imaging.reading import failure_of, find_images, read_image
from cclip_deploy.imaging.segmentation import Segmentation, check_threshold
from cclip_deploy.imaging.writing import OUTPUTS, check_outputs, mask_source, output_path, write_segmentation
from cclip_deploy.inference.explain import Explainer
from cclip_deploy.inference.explanation_plot import write_explanation
from cclip_deploy.inference.index import check_formats, write_index
from cclip_deploy.inference.prediction import Prediction, Predictions
from cclip_deploy.inference.room import Room
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.prompts.spelling import RepairedPrompt, repair_prompts

READ_AHEAD, WRITE_BEHIND, WRITERS = 2, 4, 2
BYTES_PER_PIXEL = 16
"""Memory of a mask that waits to be written: its probabilities and what is made from them."""
_NICENESS = 10


@dataclass(frozen=True)
class PredictOptions:
    """How masks are computed and written.

    Attributes:
        threshold: probability from which a pixel is part of the mask, between 0 and 1; None is the bundle's threshold.
        replace: whether masks of other images may be replaced.
        explainer: if given, an explanation is written beside every mask.
        repair: whether typing errors in prompts are corrected, as in training and evaluation.
        outputs: which of `OUTPUTS` are written for each mask.
        index: formats in which an index of the run is written, see `write_index`.
    """

    threshold: float | None = None
    replace: bool = False
    explainer: Explainer | None = None
    repair: bool = True
    outputs: tuple[str, ...] = OUTPUTS
    index: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError if an option is out of range, and EnvironmentIssue if a package for it is missing."""
        if self.threshold is not None:
            check_threshold(self.threshold)
        check_outputs(self.outputs)
        check_formats(self.index)


def predict(
    segmenter: Segmenter,
    images: Sequence[Path],
    prompts: str | Sequence[str],
    output: Path,
    options: PredictOptions = PredictOptions(),
    on_picture: Callable[[Path, int, int], None] = lambda path, number, total: None,
) -> Predictions:
    """Segment every image with every prompt and write the masks.

    One thread reads ahead and two write, while the calling thread runs the network. At most `READ_AHEAD` images wait to
    be segmented and `WRITE_BEHIND` masks to be written, and fewer if they exceed `MOST_PICTURE_BYTES`. An image that
    cannot be read, or for which memory runs out, is reported in the result; the others are processed. Results are in
    the order of images and prompts. The output folder is locked meanwhile.

    Args:
        segmenter: of a bundle.
        images: files and folders.
        prompts: a string is one prompt; or a list of prompts.
        output: folder to write to. Masks of the same image file in it are replaced.
        options: threshold, replacement and explanations.
        on_picture: called with each image, its number from 1 and the number of images, before it is segmented.

    Raises:
        UsageError: there is no prompt, or `output` is a file or holds masks of another image under the same name.
        TargetInUse: another process is writing to `output`.
        ImageError: an image does not exist, or a folder holds none.
        PromptError: a prompt is empty or too long; raised before anything is written.
        EnvironmentIssue: `output` is not writable; files that were written before are complete.
    """
    options.check()
    asked = repair_prompts(prompts, options.repair)
    check_writable(output)
    with writing_into(output):
        paths = find_images(images)
        used: set[str] = set()
        names = image_names(paths)
        stems = {path: [file_stem(path, prompt.text, used, names[path]) for prompt in asked] for path in paths}
        if not options.replace:
            _check_existing_masks(output, stems)
        return _Run(segmenter, stems, asked, output, options).predict(on_picture)


@dataclass
class _Run:
    """The parameters of a run that are the same for every image."""

    segmenter: Segmenter
    stems: Mapping[Path, Sequence[str]]
    prompts: Sequence[RepairedPrompt]
    output: Path
    options: PredictOptions

    def predict(self, on_picture: Callable[[Path, int, int], None]) -> Predictions:
        """Segment all images, and write the index, also if the run is stopped after a mask was written."""
        counted_before, started, found = self.segmenter.prompt_counts, time.monotonic(), _Found()

        def outcome(complete: bool) -> Predictions:
            counts, seconds = self.segmenter.prompt_counts.since(counted_before), time.monotonic() - started
            failed = tuple(found.failed.items())
            return Predictions(tuple(found.done), failed, tuple(self.prompts), counts, seconds, complete)

        try:
            self._segment_all(found, on_picture)
        except BaseException:
            found.collect_finished()
            if found.done:
                with suppress(CclipError):
                    self._write_index(outcome(complete=False))
            raise
        predictions = outcome(complete=True)
        self._write_index(predictions)
        return predictions

    def _write_index(self, predictions: Predictions) -> None:
        if self.options.index:
            ran = {**self.segmenter.opened.to_dict(), "graphs": dict(self.segmenter.spec.graphs)}
            write_index(self.output, self.options.index, predictions, ran)

    def _segment_all(self, found: _Found, on_picture: Callable[[Path, int, int], None]) -> None:
        self.segmenter.prepare([prompt.text for prompt in self.prompts])
        with _threads(WRITERS, "writer") as writers, _threads(1, "reader") as reader, closing(Room()) as room:
            for number, (path, read) in enumerate(_read_ahead(reader, list(self.stems), room), start=1):
                on_picture(path, number, len(self.stems))
                try:
                    picture = read.result()
                except Exception as error:  # decoders raise many kinds of errors on damaged files
                    found.fail(path, error)
                    continue
                height, width = picture.pixels.shape[:2]
                at_once = room.most_bytes // (BYTES_PER_PIXEL * height * width)
                try:
                    for write in self.masks(picture):
                        found.writing.append((path, writers.submit(write)))
                        found.collect(min(WRITE_BEHIND, max(0, at_once - 1)))
                except MemoryError as error:
                    found.fail(path, error)
                room.give(picture.pixels.nbytes)
            found.collect(0)

    def masks(self, picture: Picture) -> Iterator[Callable[[], Prediction]]:
        """Run the network, and yield a function for each prompt that writes its mask."""
        explainer = self.options.explainer
        seen = None if explainer is None else explainer.look(picture.pixels)
        features = None if seen is None else seen.features
        results = self.segmenter.segment_each(picture, self.prompts, self.options.threshold, features)
        for result, stem in zip(results, self.stems[picture.path], strict=True):
            explanation = None
            if explainer is not None and seen is not None:
                answer, path = explainer.confounding_answer(result.prompt), self.output / f"{stem}-explanation.png"
                explanation = write_explanation(path, picture.pixels, result.mask, result.prompt, seen, answer)
            yield partial(self._write, picture, result, stem, explanation)

    def _write(self, picture: Picture, result: Segmentation, stem: str, explanation: Path | None) -> Prediction:
        written = write_segmentation(picture, result, self.output, stem, self.options.outputs)
        return Prediction.of(picture.path, result, written, explanation)


@dataclass
class _Found:
    """Results, failures, and the masks that are being written."""

    done: list[Prediction] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    writing: deque[tuple[Path, Future[Prediction]]] = field(default_factory=deque)

    def collect(self, most: int) -> None:
        """Wait until at most `most` masks are being written; raise what a writer raised."""
        while len(self.writing) > most:
            path, future = self.writing.popleft()
            try:
                self.done.append(future.result())
            except MemoryError as error:
                self.fail(path, error)

    def collect_finished(self) -> None:
        """Take the results of masks that were written, after the writers have ended."""
        finished = [future for _, future in self.writing if not future.cancelled() and future.exception() is None]
        self.done += (future.result() for future in finished)

    def fail(self, path: Path, error: Exception) -> None:
        """Record why an image failed; the first reason counts."""
        self.failed.setdefault(path, failure_of(path, error))


def _check_existing_masks(output: Path, stems: Mapping[Path, Sequence[str]]) -> None:
    """Raise UsageError if existing masks are of other images, or do not contain the hash of their image."""
    for path, names in stems.items():
        written = ([output_path(output, name, what) for what in OUTPUTS] for name in names)
        there = [found for files in written if (found := next((file for file in files if file.exists()), None))]
        try:
            sha256 = sha256_input(path) if there else ""
        except DataError:  # nothing will be written for an unreadable image
            continue
        for mask in there:
            source = _source_of(mask)
            if source != sha256:
                problem = "does not contain the hash of its image" if source is None else "is of another image"
                raise UsageError(
                    f"{mask} exists and {problem}; the files of {path} would have its name. Choose another output "
                    "folder, or give --force to replace what is there."
                )


def _source_of(mask: Path) -> str | None:
    try:
        return mask_source(mask)
    except ImageError:
        return None


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool; at the end, running tasks are completed and waiting ones cancelled."""
    pool = ThreadPoolExecutor(count, f"cclip-{name}", initializer=_lower_priority)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _lower_priority() -> None:
    """Lower this thread's priority: the network's threads wait for each other, so a delayed one delays all."""
    if sys.platform == "linux":  # other systems have no priority per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _read_ahead(
    reader: ThreadPoolExecutor, paths: Sequence[Path], room: Room
) -> Iterator[tuple[Path, Future[Picture]]]:
    """Yield each path with its image, which is read ahead as far as memory allows."""

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
