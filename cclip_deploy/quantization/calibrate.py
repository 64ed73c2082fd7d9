"""Calibrate a graph: run its FP32 form on images and record the range of every tensor to be quantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.files import sha256_input
from cclip_deploy.common.names import printable
from cclip_deploy.datasets.image_sets import ImageSet, SetImage, counted, read_image_set
from cclip_deploy.datasets.options import DataSetOptions
from cclip_deploy.datasets.sample import name_some
from cclip_deploy.errors import DataError, ImageError, ParityError, UsageError
from cclip_deploy.graph.precision.ranges import Method, TensorStatistics, check_method, ranges_of, with_outputs
from cclip_deploy.imaging.preprocess import to_input
from cclip_deploy.imaging.reading import failure_of, read_image
from cclip_deploy.quantization.cache import read_entry, write_entry
from cclip_deploy.quantization.record import CalibrationImages, CalibrationPicture, CalibrationRecord
from cclip_deploy.runtime.graph_model import load_model

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]

FEWEST_PICTURES = 8
USUAL_PICTURES = 64


@dataclass(frozen=True)
class CalibrationOptions:
    """Images, method and limits of a calibration.

    Attributes:
        pictures: images, folders of images, or data sets, of which the training split is used.
        method: how a range is chosen from the values of a tensor.
        percentile: percentage of the values that the method `percentile` represents.
        limit: maximum number of images; of more, those with the lowest hashes are used.
        evaluation_set: images or data sets' test splits, which must share neither files nor patients with `pictures`.
        evaluation_limit: maximum number of evaluation images on which masks are compared.
        data_sets: how data-set folders are read.
        allow_few: accept fewer than FEWEST_PICTURES images.
        cache: folder of earlier results; None disables the cache.
    """

    pictures: tuple[Path, ...]
    method: Method = "percentile"
    percentile: float = 99.99
    limit: int = USUAL_PICTURES
    evaluation_set: tuple[Path, ...] = ()
    evaluation_limit: int = USUAL_PICTURES
    data_sets: DataSetOptions = field(default_factory=DataSetOptions)
    allow_few: bool = False
    cache: Path | None = None


class CalibrationSet(CalibrationImages):
    """The images of a calibration, with their paths in the same order."""

    paths: tuple[Path, ...]


def default_cache() -> Path:
    """Return the folder of cached calibrations, below the user's cache folder."""
    return user_cache_path("cclip-deploy") / "calibration"


def choose_pictures(options: CalibrationOptions) -> CalibrationSet:
    """Choose the images of a calibration and check them against the evaluation set; duplicate files count once.

    Raises:
        UsageError: no image was given, an option is out of range, or there are too few images.
        ImageError: an image cannot be read.
        DataError: a data set is invalid or lacks the split, a folder holds masks, or an image or its patient is also in
            the evaluation set.
    """
    _check_options(options)
    found = read_image_set(options.pictures, "train", options.data_sets)
    failed: dict[Path, str] = {}
    chosen: list[tuple[SetImage, CalibrationPicture]] = []
    by_hash = found.by_hash()
    for sha256, image in by_hash.items():
        if len(chosen) < options.limit and (pixels := _pixel_hash(image.path, failed)) is not None:
            picture = CalibrationPicture(
                name=printable(image.path.name), sha256=sha256, pixels_sha256=pixels, patient=image.patient
            )  # fmt: skip
            chosen.append((image, picture))
    different = len(by_hash) - len(failed)
    if not chosen or (different < FEWEST_PICTURES and not options.allow_few):
        raise UsageError(
            f"Calibration has {counted(different, 'different image')}; with fewer than {FEWEST_PICTURES} the ranges "
            f"are those of single images. Give more, or pass --allow-few. {' '.join(failed.values())}".strip()
        )
    pictures = tuple(picture for _, picture in chosen)
    evaluation = read_evaluation_set(options) if options.evaluation_set else ImageSet((), ())
    _refuse_overlap(pictures, evaluation.images, failed)
    return CalibrationSet(
        paths=tuple(image.path for image, _ in chosen),
        pictures=pictures,
        sources=found.sources,
        evaluation_pictures=sum(image.path not in failed for image in evaluation.images),
        evaluation_sources=evaluation.sources,
        failed=tuple(reason.replace(str(path), path.name) for path, reason in failed.items()),
    )


def read_evaluation_set(options: CalibrationOptions) -> ImageSet:
    """Return every image of the evaluation set with its prompts; raises the errors of `read_image_set`."""
    return read_image_set(options.evaluation_set, "test", options.data_sets)


def readable(images: ImageSet, on_progress: Progress) -> ImageSet:
    """Return the readable images; report the others to `on_progress`. Raise ImageError if none is readable."""
    failed: dict[Path, str] = {}
    usable = tuple(image for image in images.images if _pixel_hash(image.path, failed) is not None)
    for reason in failed.values():
        on_progress(f"Left out: {reason}")
    if failed and not usable:
        raise ImageError(next(iter(failed.values())))
    return replace(images, images=usable)


def calibrate(
    bundle: Bundle,
    graph: str,
    model: onnx.ModelProto,
    chosen: CalibrationSet,
    options: CalibrationOptions,
    threads: int | None = None,
    on_progress: Progress = lambda _: None,
) -> CalibrationRecord:
    """Return the ranges of a graph's tensors over the given images, from the cache if they are there.

    `model` is the FP32 graph named `graph`, loaded from the bundle.

    Raises:
        ParityError: a tensor is not finite for an image; the message names both.
    """
    from cclip_deploy.graph.precision.convert import tensors_to_calibrate

    record = CalibrationRecord(
        graph=graph,
        graph_sha256=bundle.graph(graph).sha256,
        method=options.method,
        percentile=options.percentile if options.method == "percentile" else None,
        pictures=chosen.pictures,
        sources=chosen.sources,
        evaluation_pictures=chosen.evaluation_pictures,
        evaluation_sources=chosen.evaluation_sources,
        failed=chosen.failed,
        ranges={},
    )
    tensors = tensors_to_calibrate(model)
    key = _cache_key(bundle, record, tensors)
    known = read_entry(options.cache, key, on_progress) if options.cache else None
    if known is None:
        found = _statistics(bundle, graph, model, tensors, chosen.paths, threads, on_progress)
        known = ranges_of(found, options.method, options.percentile)
        if options.cache:
            write_entry(options.cache, key, known)
    else:
        on_progress(f"Ranges of {graph} on these {len(chosen.paths)} images are in {options.cache}")
    return record.model_copy(update={"ranges": known})


def collect_statistics(
    bundle: Bundle, graph: str, paths: Sequence[Path], threads: int | None = None
) -> dict[str, TensorStatistics]:
    """Return the histogram over the given images of each tensor that is to be quantized."""
    from cclip_deploy.graph.precision.convert import tensors_to_calibrate

    model = load_model(bundle, graph)
    return _statistics(bundle, graph, model, tensors_to_calibrate(model), paths, threads, lambda _: None)


def _statistics(
    bundle: Bundle,
    graph: str,
    model: onnx.ModelProto,
    tensors: Sequence[str],
    paths: Sequence[Path],
    threads: int | None,
    on_progress: Progress,
) -> dict[str, TensorStatistics]:
    from cclip_deploy.parity.reference import seeded_inputs
    from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session

    manifest = bundle.manifest
    session = make_session(load_onnxruntime("cpu"), with_outputs(model, tensors).SerializeToString(), threads=threads)
    given = {value.name for value in model.graph.input}
    computed = [name for name in tensors if name not in given]
    # No quantized tensor depends on the tokens.
    tokens = seeded_inputs(manifest.image_hw, manifest.prompt_length)[1][:1]
    statistics = {name: TensorStatistics() for name in tensors}
    for number, path in enumerate(paths, start=1):
        on_progress(f"Calibrating {graph}, image {number} of {len(paths)}")
        image = to_input(read_image(path).pixels, manifest.image_hw, manifest.preprocessing)
        feeds = {name: value for name, value in (("image", image), ("tokens", tokens)) if name in given}
        values = feeds | dict(zip(computed, session.run(computed, feeds), strict=True))
        for name in tensors:
            _count(statistics[name], values[name], name, graph, path)
    return statistics


def _count(statistics: TensorStatistics, values: NDArray[np.float32], name: str, graph: str, path: Path) -> None:
    try:
        statistics.add(values)
    except ParityError as error:
        raise ParityError(
            f"Tensor {name!r} of the FP32 {graph} is not finite for {path}: {error}. Check image and checkpoint."
        ) from error


def _check_options(options: CalibrationOptions) -> None:
    if not options.pictures:
        raise UsageError("A quantized precision needs calibration images: give --calibration DIR.")
    check_method(options.method, options.percentile)
    if options.limit < 1:
        raise UsageError(f"A limit of {options.limit} calibration images is out of range. Use 1 or more.")


def _pixel_hash(path: Path, failed: dict[Path, str]) -> str | None:
    """Return the SHA-256 of an image's pixels; None, with the reason in `failed`, if the image cannot be read."""
    try:
        pixels = read_image(path).pixels
    except Exception as error:  # decoders raise many types for invalid files
        failed[path] = failure_of(path, error)
        return None
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _refuse_overlap(
    pictures: Sequence[CalibrationPicture], evaluation: Sequence[SetImage], failed: dict[Path, str]
) -> None:
    files = {sha256_input(image.path) for image in evaluation}
    pixels = {_pixel_hash(image.path, failed) for image in evaluation}
    shared = [p.name for p in pictures if p.sha256 in files or p.pixels_sha256 in pixels]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(pictures)} calibration images are in the evaluation set too (first {shared[0]}). "
            "Calibrate with other images: masks must not be evaluated on calibration images."
        )
    evaluated = {image.patient for image in evaluation} - {None}
    overlapping = [picture for picture in pictures if picture.patient in evaluated]
    if overlapping:
        patients = dict.fromkeys(str(picture.patient) for picture in overlapping)
        raise DataError(
            f"{len(overlapping)} of {len(pictures)} calibration images are of {counted(len(patients), 'patient')} in "
            f"the evaluation set too (first {name_some(patients)}). Calibrate with images of other patients."
        )


def _cache_key(bundle: Bundle, record: CalibrationRecord, tensors: Sequence[str]) -> str:
    content = {
        **record.model_dump(mode="json", include={"graph_sha256", "method", "percentile"}),
        "pictures": [picture.sha256 for picture in record.pictures],
        "preprocessing": bundle.manifest.preprocessing.model_dump(mode="json"),
        "image_hw": bundle.manifest.image_hw,
        "tensors": list(tensors),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
