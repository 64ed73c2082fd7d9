"""The two halves of an evaluation set in a sensitivity search: one decides, the other judges, no patient is in both."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from cclip_deploy.common.files import sha256_input
from cclip_deploy.datasets.image_sets import ImageSet, SetImage, counted
from cclip_deploy.errors import UsageError

FEWEST_EACH = 2


@dataclass(frozen=True)
class Halves:
    """The images that decide what is kept, and those that the result is judged on."""

    tuning: ImageSet
    held_out: ImageSet

    @property
    def images(self) -> list[SetImage]:
        """Those that decide, then those that judge."""
        return [*self.tuning.images, *self.held_out.images]

    def describe(self) -> list[str]:
        """What was taken from where, and how it was dealt, line by line."""
        shown = [
            counted(len(half.images), "image")
            + (f" of {counted(len(half.patients), 'patient')}" if half.patients else "")
            for half in (self.tuning, self.held_out)
        ]
        lines = [
            f"Evaluation set: {'; '.join(source.describe() for source in self.tuning.sources)}",
            f"Tuning on {shown[0]}, judging on {shown[1]}; no patient is in both",
        ]
        if any(image.patient is None for image in self.images):
            lines.append(
                "Images without a known patient count as patients of their own. Give --subject, or a subject column."
            )
        return lines


def deal_out(evaluation: ImageSet) -> Halves:
    """Two parts that share no patient; an image without a known patient counts as one of its own.

    Patients are dealt from the one with the most images, each to the smaller part, equal ones in the order of their
    files' hashes.

    Raises:
        UsageError: a part has fewer than FEWEST_EACH images.
    """
    of_patient: dict[str, list[SetImage]] = defaultdict(list)
    for sha256, image in evaluation.by_hash().items():
        of_patient[image.patient or sha256].append(image)
    parts: tuple[list[SetImage], list[SetImage]] = ([], [])
    for images in sorted(of_patient.values(), key=len, reverse=True):
        min(parts, key=len).extend(images)
    if min(map(len, parts)) < FEWEST_EACH:
        found = f"{counted(sum(map(len, parts)), 'different image')} of {counted(len(of_patient), 'patient')}"
        raise UsageError(
            f"The evaluation set has {found}; one half "
            f"decides and the other judges, without a patient in both, so each needs {FEWEST_EACH} images or more. "
            "Give images of more patients, or a higher --pictures."
        )
    tuning, held_out = (replace(evaluation, images=tuple(part)) for part in parts)
    return Halves(tuning, held_out)


def hashes(half: ImageSet) -> tuple[str, ...]:
    """SHA-256 of each image's file."""
    return tuple(sha256_input(image.path) for image in half.images)
