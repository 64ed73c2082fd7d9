"""Predict: pictures and prompts to masks on disk, one image pass a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cclip_deploy.data.images import find_pictures, read_picture
from cclip_deploy.data.masks import WrittenMask, file_stem, write_segmentation
from cclip_deploy.errors import ImageError, UsageError
from cclip_deploy.files import disk_problem
from cclip_deploy.segmenter import Segmenter


@dataclass(frozen=True)
class Prediction:
    """One prompt on one picture. Shares and probabilities are in [0, 1], in the picture's own pixels."""

    image: Path
    prompt: str
    area_share: float
    mean_probability: float
    mean_probability_inside: float | None
    written: WrittenMask

    def to_dict(self) -> dict[str, object]:
        """The form of `predict --json`."""
        return {
            "image": str(self.image),
            "prompt": self.prompt,
            "files": {
                "mask": str(self.written.mask),
                "probability": str(self.written.probability),
                "overlay": str(self.written.overlay),
            },
            "area_share": self.area_share,
            "mean_probability": self.mean_probability,
            "mean_probability_inside": self.mean_probability_inside,
        }


@dataclass(frozen=True)
class Predictions:
    """What was written, and which pictures could not be read, with the reason."""

    done: tuple[Prediction, ...]
    failed: tuple[tuple[Path, str], ...]


def predict(
    segmenter: Segmenter,
    images: Sequence[Path],
    prompts: Sequence[str],
    output: Path,
    threshold: float | None = None,
    on_picture: Callable[[Path, int, int], None] = lambda path, number, total: None,
) -> Predictions:
    """Segment every prompt on every picture; a picture that cannot be read is reported and the rest go on.

    Raises:
        UsageError: no prompt, or an output that is a file.
        ImageError: a picture does not exist, or a folder holds none.
        PromptError: a prompt is empty or too long, before anything is written.
        EnvironmentProblem: the output cannot be written.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise UsageError(f"A threshold of {threshold} is not between 0 and 1. Leave it out for the bundle's own.")
    segmenter.encode_prompts(prompts)
    paths = find_pictures(images)
    _make_folder(output)
    done: list[Prediction] = []
    failed: list[tuple[Path, str]] = []
    used_stems: set[str] = set()
    for number, path in enumerate(paths, start=1):
        on_picture(path, number, len(paths))
        try:
            done += _predict_one(segmenter, path, prompts, output, threshold, used_stems)
        except ImageError as error:
            failed.append((path, str(error)))
    return Predictions(tuple(done), tuple(failed))


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


def _make_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, where a folder for the masks is expected. Choose another output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_problem(output, error) from error


def _predict_one(
    segmenter: Segmenter,
    path: Path,
    prompts: Sequence[str],
    output: Path,
    threshold: float | None,
    used_stems: set[str],
) -> list[Prediction]:
    picture = read_picture(path)
    limit = segmenter.bundle.manifest.threshold if threshold is None else threshold
    predictions = []
    for prompt, probability in zip(prompts, segmenter.probabilities(picture.pixels, prompts), strict=True):
        inside = probability >= limit
        written = write_segmentation(picture, prompt, probability, output, file_stem(path, prompt, used_stems), limit)
        predictions.append(
            Prediction(
                image=path,
                prompt=prompt,
                area_share=float(inside.mean()),
                mean_probability=float(probability.mean()),
                mean_probability_inside=float(probability[inside].mean()) if inside.any() else None,
                written=written,
            )
        )
    return predictions
