"""Split an evaluation set into a tuning half and a held-out half that share no patient."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from cclip_deploy.common.files import sha256_input
from cclip_deploy.datasets.image_sets import ImageSet, SetImage, counted
from cclip_deploy.errors import UsageError

FEWEST_EACH = 2


@dataclass(frozen=True)
class Halves:
    """Images on which a sensitivity search decides, and images on which its result is evaluated."""

    tuning: ImageSet
    held_out: ImageSet

    @property
    def images(self) -> list[SetImage]:
        """The tuning images, then the held-out images."""
        return [*self.tuning.images, *self.held_out.images]

    def describe(self) -> list[str]:
        """Return lines that describe the sources and the split."""
        shown = [
            counted(len(half.images), "image")
            + (f" of {counted(len(half.patients), 'patient')}" if half.patients else "")
            for half in (self.tuning, self.held_out)
        ]
        lines = [
            f"Evaluation set: {'; '.join(source.describe() for source in self.tuning.sources)}",
            f"Tuning on {shown[0]}, evaluating on {shown[1]}; no patient is in both",
        ]
        if any(image.patient is None for image in self.images):
            lines.append(
                "Images without a known patient count as separate patients. Give --subject, or a subject column."
            )
        return lines


def split_by_patient(evaluation: ImageSet) -> Halves:
    """Split an evaluation set by patient; an image without a known patient counts as its own patient.

    Patients are assigned from the one with the most images on, each to the smaller half, in the order of file hashes
    among equals.

    Raises:
        UsageError: a half has fewer than FEWEST_EACH images.
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
            f"The evaluation set has {found}. It is split into a tuning half and a held-out half that share no "
            f"patient, and each half needs {FEWEST_EACH} images or more. "
            "Give images of more patients, or a higher --pictures."
        )
    tuning, held_out = (replace(evaluation, images=tuple(part)) for part in parts)
    return Halves(tuning, held_out)


def hashes(half: ImageSet) -> tuple[str, ...]:
    """Return the SHA-256 of each image's file."""
    return tuple(sha256_input(image.path) for image in half.images)
