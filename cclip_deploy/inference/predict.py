"""Segment image files and write the masks; reading and writing run in threads beside the network."""

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

from cclip_deploy.common.files import sha256_input, writing_into
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import check_writable
from cclip_deploy.errors import DataError, ImageError, UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.reading import failure_of, find_images, read_image
from cclip_deploy.imaging.segmentation import Segmentation, check_threshold
from cclip_deploy.imaging.writing import WrittenMask, file_stem, mask_path, mask_source, write_segmentation
from cclip_deploy.inference.explain import Explainer
from cclip_deploy.inference.explanation_plot import write_explanation
from cclip_deploy.inference.prompt_cache import CacheCounts
from cclip_deploy.inference.room import Room
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.prompts.spelling import RepairedPrompt, repair_prompts

READ_AHEAD, WRITE_BEHIND, WRITERS = 2, 4, 2
BYTES_PER_PIXEL = 16
"""Memory of a mask that waits to be written: its probabilities and what is made from them."""
_NICENESS = 10


@dataclass(frozen=True)
class Prediction:
    """The result for one image and prompt. Fractions and probabilities are in [0, 1], at the size of the image file."""

    image: Path
    prompt: str
    area_share: float
    mean_probability: float
    mean_probability_inside: float | None
    written: WrittenMask
    explanation: Path | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form of `predict --json`."""
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
    """The results, the images that could not be used with the reason, and the prompts and their cache counts."""

    done: tuple[Prediction, ...]
    failed: tuple[tuple[Path, str], ...]
    prompts: tuple[RepairedPrompt, ...]
    prompt_counts: CacheCounts


@dataclass(frozen=True)
class PredictOptions:
    """How masks are computed and written.

    Attributes:
        threshold: probability from which a pixel is part of the mask, between 0 and 1; None is the bundle's threshold.
        replace: whether masks of other images may be replaced.
        explainer: if given, an explanation is written beside every mask.
        repair: whether typing errors in prompts are corrected, as in training and evaluation.
    """

    threshold: float | None = None
    replace: bool = False
    explainer: Explainer | None = None
    repair: bool = True


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
    if options.threshold is not None:
        check_threshold(options.threshold)
    asked = repair_prompts(prompts, options.repair)
    check_writable(output)
    with writing_into(output):
        paths = find_images(images)
        used: set[str] = set()
        stems = {path: [file_stem(path, prompt.text, used) for prompt in asked] for path in paths}
        if not options.replace:
            _check_existing_masks(output, stems)
        return _predict(_Run(segmenter, stems, asked, output, options), on_picture)


def _predict(run: _Run, on_picture: Callable[[Path, int, int], None]) -> Predictions:
    segmenter, found, total = run.segmenter, _Found(), len(run.stems)
    counted_before = segmenter.prompt_counts
    segmenter.prepare([prompt.text for prompt in run.prompts])
    with _threads(WRITERS, "writer") as writers, _threads(1, "reader") as reader, closing(Room()) as room:
        for number, (path, read) in enumerate(_read_ahead(reader, list(run.stems), room), start=1):
            on_picture(path, number, total)
            try:
                picture = read.result()
            except Exception as error:  # decoders raise many kinds of errors on damaged files
                found.fail(path, error)
                continue
            height, width = picture.pixels.shape[:2]
            at_once = room.most_bytes // (BYTES_PER_PIXEL * height * width)
            try:
                for write in run.masks(picture):
                    found.writing.append((path, writers.submit(write)))
                    found.collect(min(WRITE_BEHIND, max(0, at_once - 1)))
            except MemoryError as error:
                found.fail(path, error)
            room.give(picture.pixels.nbytes)
        found.collect(0)
    counts = segmenter.prompt_counts.since(counted_before)
    return Predictions(tuple(found.done), tuple(found.failed.items()), tuple(run.prompts), counts)


@dataclass
class _Run:
    """The parameters of a run that are the same for every image."""

    segmenter: Segmenter
    stems: Mapping[Path, Sequence[str]]
    prompts: Sequence[RepairedPrompt]
    output: Path
    options: PredictOptions

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
            yield partial(_write, picture, result, self.output, stem, explanation)


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

    def fail(self, path: Path, error: Exception) -> None:
        """Record why an image failed; the first reason counts."""
        self.failed.setdefault(path, failure_of(path, error))


def refuse_failures(predictions: Predictions) -> None:
    """Raise ImageError if images could not be used."""
    if not predictions.failed:
        return
    (path, reason), count = predictions.failed[0], len(predictions.failed)
    if count == 1 and not predictions.done:
        raise ImageError(reason)
    raise ImageError(
        f"{count} of {count + len({p.image for p in predictions.done})} images could not be used "
        f"(the others are done); first: {path}: {reason}"
    )


def _check_existing_masks(output: Path, stems: Mapping[Path, Sequence[str]]) -> None:
    """Raise UsageError if existing masks are of other images, or do not contain the hash of their image."""
    for path, names in stems.items():
        there = [mask for mask in (mask_path(output, name) for name in names) if mask.exists()]
        try:
            sha256 = sha256_input(path) if there else ""
        except DataError:  # nothing will be written for an unreadable image
            continue
        for mask in there:
            source = _source_of(mask)
            if source != sha256:
                problem = "does not contain the hash of its image" if source is None else "is of another image"
                raise UsageError(
                    f"{mask} exists and {problem}; the mask of {path} would replace it. Choose another output folder, "
                    "or give --force to replace it."
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


def _write(
    picture: Picture, result: Segmentation, output: Path, stem: str, explanation: Path | None = None
) -> Prediction:
    return Prediction(
        image=picture.path,
        prompt=result.prompt,
        area_share=result.area_share,
        mean_probability=result.mean_probability,
        mean_probability_inside=result.mean_probability_inside,
        written=write_segmentation(picture, result, output, stem),
        explanation=explanation,
    )
