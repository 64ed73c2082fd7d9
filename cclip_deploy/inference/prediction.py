"""Results of `predict`: what was computed and written for each image and prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cclip_deploy.common.names import printable
from cclip_deploy.errors import ImageError
from cclip_deploy.imaging.segmentation import Segmentation
from cclip_deploy.imaging.writing import WrittenMask
from cclip_deploy.inference.prompt_cache import CacheCounts
from cclip_deploy.prompts.spelling import RepairedPrompt


@dataclass(frozen=True)
class Prediction:
    """The result for one image and prompt; see `Segmentation` for the numbers.

    Attributes:
        image: path as it was given.
        written: the files.
        explanation: file of the plot, if one was requested.
    """

    image: Path
    prompt: str
    area_share: float
    area_px: int
    area_mm2: float | None
    mean_probability: float
    mean_probability_inside: float | None
    box: tuple[int, int, int, int] | None
    region_count: int
    warnings: tuple[str, ...]
    written: WrittenMask
    explanation: Path | None = None

    @staticmethod
    def of(image: Path, result: Segmentation, written: WrittenMask, explanation: Path | None) -> Prediction:
        """Return the numbers and files of a segmentation, without its arrays."""
        return Prediction(
            image, result.prompt, result.area_share, result.area_px, result.area_mm2, result.mean_probability,
            result.mean_probability_inside, result.box, result.region_count, result.warnings, written, explanation,
        )  # fmt: skip

    @property
    def files(self) -> Mapping[str, Path]:
        """Every written file by its kind."""
        return {**self.written.files, **({} if self.explanation is None else {"explanation": self.explanation})}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of `predict --json`."""
        return {
            "image": printable(self.image),
            "prompt": self.prompt,
            "files": {what: printable(path) for what, path in self.files.items()},
            "area_share": self.area_share,
            "area_px": self.area_px,
            "area_mm2": self.area_mm2,
            "mean_probability": self.mean_probability,
            "mean_probability_inside": self.mean_probability_inside,
            "box": None if self.box is None else list(self.box),
            "region_count": self.region_count,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Predictions:
    """The outcome of a run.

    Attributes:
        done: results, in the order of images and prompts.
        failed: images that could not be used, each with the reason.
        prompts: as written and as repaired.
        prompt_counts: where the kernels of the prompts came from.
        seconds: duration of the run, without loading the bundle.
        complete: whether every image was processed; False in the index of a run that was stopped.
    """

    done: tuple[Prediction, ...]
    failed: tuple[tuple[Path, str], ...]
    prompts: tuple[RepairedPrompt, ...]
    prompt_counts: CacheCounts
    seconds: float
    complete: bool = True

    @property
    def image_count(self) -> int:
        """Number of images of which masks were written."""
        return len({row.image for row in self.done})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of `predict --json`, without what ran."""
        return {
            "images": self.image_count,
            "masks": len(self.done),
            "seconds": self.seconds,
            "complete": self.complete,
            "predictions": [row.to_dict() for row in self.done],
            "failed": [{"image": printable(path), "error": reason} for path, reason in self.failed],
            "repaired_prompts": [prompt.to_dict() for prompt in self.prompts if prompt.repairs],
            "prompt_kernels": self.prompt_counts.to_dict(),
        }

    def summary(self) -> str:
        """Return a sentence: "3 images, 6 masks in 1.2 s (2.5 images/s); 1 image could not be used."."""
        images, masks, failed = self.image_count, len(self.done), len(self.failed)
        rate = f" ({images / self.seconds:.3g} images/s)" if images and self.seconds else ""
        left_out = f"; {_counted(failed, 'image')} could not be used" if failed else ""
        return f"{_counted(images, 'image')}, {_counted(masks, 'mask')} in {self.seconds:.3g} s{rate}{left_out}."


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


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
