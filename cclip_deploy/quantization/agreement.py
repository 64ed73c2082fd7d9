"""Agreement of a low precision's masks with FP32's, on evaluation images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.names import printable
from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.datasets.image_sets import ImageSet, ImageSource
from cclip_deploy.errors import ParityError
from cclip_deploy.evaluation.split import encode_texts
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.compare import mask_dices
from cclip_deploy.parity.reference import PICTURE_PROMPTS
from cclip_deploy.quantization.calibrate import CalibrationOptions, Progress, read_evaluation_set, readable
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend

LEAST_MEAN_DICE, LEAST_DICE = 0.99, 0.95
"""Least mean Dice of a quantized network over all masks, and least mean of an image, on an evaluation set."""


class MaskAgreement(StrictModel):
    """Dice of a precision's masks to FP32's.

    Attributes:
        precision: compared with FP32.
        pictures: number of images.
        masks: number of masks, one per image and prompt.
        patients: number of known patients of the images.
        cut_prompts: prompts longer than the bundle's prompt length, truncated as in `evaluate`.
        sources: data sets and folders of the images.
        mean: over all masks.
        worst: lowest mean over the prompts of one image.
        worst_mask: lowest Dice of one mask.
        worst_picture: name of the image with the lowest mean.
    """

    precision: str
    pictures: int
    masks: int
    patients: int
    cut_prompts: int
    sources: tuple[ImageSource, ...]
    mean: float
    worst: float
    worst_mask: float
    worst_picture: str


def measure_mask_agreement(
    bundle: Bundle, precision: str, images: ImageSet, threads: int | None = None
) -> MaskAgreement:
    """Compare the masks of a deploy bundle in a precision with those of its FP32 graphs, image by image.

    Args:
        bundle: has the graphs in both precisions.
        precision: compared with FP32.
        images: with their prompts.
        threads: of ONNX Runtime on the CPU.
    """
    full, low = (
        Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, kind, "cpu", threads, rounds_as_written=True))
        for kind in ("fp32", precision)
    )
    tokenizer, length = bundle.tokenizer(), bundle.manifest.prompt_length
    dices: dict[Path, list[float]] = {}
    cut: list[bool] = []
    for image in images.images:
        pixels = read_image(image.path).pixels
        rows, were_cut = encode_texts(image.prompts, tokenizer, length)
        logits = [s.decode(s.encode_image(pixels), s.encode_tokens(rows)) for s in (low, full)]
        dices[image.path] = mask_dices(*logits).ravel().tolist()
        cut += were_cut
    means = {path: float(np.mean(values)) for path, values in dices.items()}
    worst = min(means, key=means.__getitem__)
    every = [value for values in dices.values() for value in values]
    return MaskAgreement(
        precision=precision,
        pictures=len(dices),
        masks=len(every),
        patients=len(images.patients),
        cut_prompts=sum(cut),
        sources=images.sources,
        mean=float(np.mean(every)),
        worst=means[worst],
        worst_mask=min(every),
        worst_picture=printable(worst.name),
    )


def write_agreement(found: MaskAgreement, folder: Path) -> None:
    """Write an agreement into the folder of a bundle under construction."""
    path = folder / report_name(found.precision)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def report_name(precision: str) -> str:
    """Return the path, inside a bundle, of the agreement of a precision's masks with FP32's."""
    return f"reports/{precision}.masks.json"


def with_prompts(found: ImageSet) -> ImageSet:
    """Return the image set with default prompts, those of the reference outputs, for images that have none."""
    images = tuple(image if image.prompts else replace(image, prompts=PICTURE_PROMPTS) for image in found.images)
    return replace(found, images=images)


def evaluation_images(options: CalibrationOptions, on_progress: Progress = lambda _: None) -> ImageSet:
    """Return the readable evaluation images, at most `evaluation_limit`, from as many patients as possible.

    Unreadable ones are reported to `on_progress`. Raise ImageError if none is readable.
    """
    return with_prompts(readable(read_evaluation_set(options).limited(options.evaluation_limit), on_progress))


def check_mask_agreement(bundle: Bundle, precision: str, images: ImageSet, threads: int | None = None) -> MaskAgreement:
    """Measure the agreement on an evaluation set; raise ParityError if it is below LEAST_MEAN_DICE or LEAST_DICE."""
    found = measure_mask_agreement(bundle, precision, images, threads)
    if not (found.mean >= LEAST_MEAN_DICE and found.worst >= LEAST_DICE):
        raise ParityError(
            f"{precision} masks differ too much from FP32's on the evaluation set: mean Dice "
            f"{found.mean:.4f} (at least {LEAST_MEAN_DICE}), worst image {found.worst:.4f} ({found.worst_picture}; "
            f"at least {LEAST_DICE}). Leave sensitive blocks in a higher precision (--keep), or calibrate with more or "
            "other images. Nothing was published."
        )
    return found
