"""Calibrate: run a bundle's FP32 graph over pictures and keep the range of every tensor that is to be quantised."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle import Bundle
from cclip_deploy.data.images import find_pictures, read_picture
from cclip_deploy.data.layouts import read_flat
from cclip_deploy.data.preprocess import to_input
from cclip_deploy.errors import DataError, ParityError, UsageError
from cclip_deploy.files import sha256_file
from cclip_deploy.graph.calibration import METHODS, Method, TensorStatistics, ranges_of, with_outputs
from cclip_deploy.pipeline.calibration_cache import read_entry, write_entry
from cclip_deploy.pipeline.calibration_record import CalibrationPicture, CalibrationRecord

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]

FEWEST_PICTURES = 8
USUAL_PICTURES = 64


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate with.

    Attributes:
        pictures: files and folders of pictures, or data-set folders, of which the training split is taken.
        method: how a range is chosen of what was seen.
        percentile: share of the values, in per cent, that the method `percentile` represents.
        limit: how many pictures to use at most; of more, those whose hashes come first.
        evaluation_set: pictures that must not be among them; of a data-set folder its test split.
        allow_few: take fewer than FEWEST_PICTURES.
        cache: folder of earlier results; None keeps none.
    """

    pictures: tuple[Path, ...]
    method: Method = "percentile"
    percentile: float = 99.99
    limit: int = USUAL_PICTURES
    evaluation_set: tuple[Path, ...] = ()
    allow_few: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class CalibrationSet:
    """The pictures that are used, in the order of their hashes, and the size of the evaluation set."""

    paths: tuple[Path, ...]
    pictures: tuple[CalibrationPicture, ...]
    evaluation_pictures: int


def default_cache() -> Path:
    """Where calibrations are kept between runs: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cclip-deploy" / "calibration"


def choose_pictures(options: CalibrationOptions) -> CalibrationSet:
    """Find, hash, choose and compare the pictures of a calibration; a picture that lies there twice counts once.

    Raises:
        UsageError: no picture was named, an option means nothing, or there are too few.
        ImageError: a picture cannot be read.
        DataError: a picture is in the evaluation set too, by its file or by its pixels.
    """
    _check_options(options)
    by_hash = {sha256_file(path): path for path in reversed(_pictures(options.pictures, "train"))}
    if len(by_hash) < FEWEST_PICTURES and not options.allow_few:
        raise UsageError(
            f"There {_are(len(by_hash))} to calibrate with; below {FEWEST_PICTURES} the ranges are those of "
            "single pictures. Give more, or --allow-few to take these."
        )
    chosen = sorted(by_hash)[: options.limit]
    pictures = tuple(
        CalibrationPicture(name=by_hash[sha256].name, sha256=sha256, pixels_sha256=_pixel_hash(by_hash[sha256]))
        for sha256 in chosen
    )
    evaluation = _pictures(options.evaluation_set, "test") if options.evaluation_set else []
    _refuse_overlap(pictures, evaluation)
    return CalibrationSet(tuple(by_hash[sha256] for sha256 in chosen), pictures, len(evaluation))


def calibrate(
    bundle: Bundle,
    graph: str,
    model: onnx.ModelProto,
    chosen: CalibrationSet,
    options: CalibrationOptions,
    threads: int | None = None,
    on_progress: Progress = lambda _: None,
) -> CalibrationRecord:
    """The ranges of a graph's tensors over these pictures, from the cache where they are known already.

    `model` is that FP32 graph, loaded from the bundle.

    Raises:
        ParityError: a tensor is not finite on a picture; both are named.
    """
    from cclip_deploy.graph.lower import tensors_to_calibrate

    record = CalibrationRecord(
        graph=graph,
        graph_sha256=bundle.graph(graph).sha256,
        method=options.method,
        percentile=options.percentile if options.method == "percentile" else None,
        pictures=chosen.pictures,
        evaluation_pictures=chosen.evaluation_pictures,
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
        on_progress(f"Ranges of {graph} on these {len(chosen.paths)} pictures are in {options.cache}")
    return record.model_copy(update={"ranges": known})


def collect_statistics(
    bundle: Bundle, graph: str, paths: Sequence[Path], threads: int | None = None
) -> dict[str, TensorStatistics]:
    """What each tensor of a graph that is to be quantised held over the pictures; for the documentation's curve."""
    import onnx

    from cclip_deploy.graph.lower import tensors_to_calibrate

    model = onnx.load(bundle.file(bundle.graph(graph).file))
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
    from cclip_deploy.evidence.reference import seeded_inputs
    from cclip_deploy.runtime.onnx_runtime import load_onnxruntime, make_session

    manifest = bundle.manifest
    session = make_session(load_onnxruntime("cpu"), with_outputs(model, tensors).SerializeToString(), threads=threads)
    given = {value.name for value in model.graph.input}
    computed = [name for name in tensors if name not in given]
    tokens = seeded_inputs(manifest.image_hw, manifest.prompt_length)[1][:1]  # what is quantised depends on no token
    statistics = {name: TensorStatistics() for name in tensors}
    for number, path in enumerate(paths, start=1):
        on_progress(f"Calibrating {graph}, picture {number} of {len(paths)}")
        image = to_input(read_picture(path).pixels, manifest.image_hw, manifest.preprocessing)
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
            f"Tensor {name!r} of the FP32 {graph} is not finite on {path}: {error}. Check picture and checkpoint."
        ) from error


def _check_options(options: CalibrationOptions) -> None:
    if not options.pictures:
        raise UsageError("A quantised precision needs pictures to calibrate with: give --calibration DIR.")
    if options.method not in METHODS:
        raise UsageError(f"There is no calibration method {options.method!r}. Use {', '.join(METHODS)}.")
    if not 50 < options.percentile <= 100:
        raise UsageError(f"A percentile of {options.percentile} makes no sense here. Use one above 50, up to 100.")
    if options.limit < 1:
        raise UsageError(f"A limit of {options.limit} calibration pictures makes no sense. Use 1 or more.")


def _pictures(paths: Sequence[Path], split: str) -> list[Path]:
    """The pictures that files and folders name; of a data-set folder those of the split, or all if it has one split."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and any(path.glob("*.csv")):
            referrals = read_flat(path)
            splits = {referral.split for referral in referrals}
            rows = [r.image for r in referrals if r.split == split or len(splits) == 1]
            if not rows:
                raise DataError(f"{path} has no rows of split {split!r}; its splits: {', '.join(sorted(splits))}.")
            found += dict.fromkeys(rows)
        else:
            found += find_pictures([path])
    return found


def _pixel_hash(path: Path) -> str:
    pixels = read_picture(path).pixels
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _refuse_overlap(pictures: Sequence[CalibrationPicture], evaluation: Sequence[Path]) -> None:
    files = {sha256_file(path) for path in evaluation}
    pixels = {_pixel_hash(path) for path in evaluation}
    shared = [p.name for p in pictures if p.sha256 in files or p.pixels_sha256 in pixels]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(pictures)} calibration pictures are in the evaluation set too (first {shared[0]}). "
            "What is judged on them would be judged on what it was fitted to: calibrate with others."
        )


def _are(count: int) -> str:
    return "is 1 picture" if count == 1 else f"are {count} pictures"


def _cache_key(bundle: Bundle, record: CalibrationRecord, tensors: Sequence[str]) -> str:
    told = {
        **record.model_dump(mode="json", include={"graph_sha256", "method", "percentile"}),
        "pictures": [picture.sha256 for picture in record.pictures],
        "preprocessing": bundle.manifest.preprocessing.model_dump(mode="json"),
        "image_hw": bundle.manifest.image_hw,
        "tensors": list(tensors),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
