"""Sample type of all data-set formats, and checks that the formats share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import is_file, shown
from cclip_deploy.datasets.mask_file import read_mask
from cclip_deploy.errors import DataError, ImageError, UsageError
from cclip_deploy.imaging.reading import image_orientation, image_size, is_dicom_file, is_image_file

SPLITS = ("train", "val", "test")
SUBJECT_PATTERNS = (
    r"sub-S\d+",  # QaTa-COV19, after BIMCV-COVID19
    r"Morozov_study_\d+",  # MosMedData+: a slice of a CT study
    r"Jun_.*case\d+",  # MosMedData+: the same
    r"patient\d+",  # CAMUS and CheXlocalize
)
"""Patterns of the patient (or CT study) in file names of published data sets."""
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Sample:
    """One row of a data set: `mask` marks the region of `image` that `text` describes."""

    image: Path
    mask: Path
    text: str
    split: str
    subject: str
    mask_values: tuple[str, ...] = ()
    """Values of the mask file that are inside; see `mask_file.decode_mask`."""

    def read_mask(self) -> NDArray[np.bool_]:
        """Read the mask as (H, W) bool; raises the errors of `mask_file.decode_mask`."""
        return read_mask(self.mask, self.mask_values)

    @property
    def patient(self) -> str | None:
        """The subject, or None if the patient is unknown and the image's name is used instead."""
        return None if self.subject.endswith(self.image.name) else self.subject


def of_split(samples: Sequence[Sample], split: str) -> list[Sample]:
    """Return the samples of one split; raise DataError if there are none."""
    chosen = [sample for sample in samples if sample.split == split]
    if not chosen:
        held = ", ".join(sorted({sample.split for sample in samples})) or "none"
        raise DataError(f"The data set has no rows of split {split!r}; its splits: {held}. Add rows of that split.")
    return chosen


def subject_of(image_name: str, pattern: str | None = None) -> str:
    """Return the patient in a file name (see `patient_of`), or the name itself."""
    return patient_of(image_name, pattern) or image_name


def patient_of(image_name: str, pattern: str | None = None) -> str | None:
    """Return the patient in a file name, or None if no pattern matches.

    Args:
        image_name: file name.
        pattern: regular expression, whose first group is used if it has one; default: SUBJECT_PATTERNS.

    Raises:
        UsageError: `pattern` is not a regular expression.
    """
    for known in SUBJECT_PATTERNS if pattern is None else (pattern,):
        try:
            found = re.search(known, image_name)
        except re.error as error:
            raise UsageError(f"{known!r} is not a regular expression: {error}. Example: 'sub-S\\d+'.") from error
        if found:
            patient = found[1] if found.re.groups else found[0]
            return patient and printable(patient)
    return None


def check_sizes(image: Path, mask: Path, where: str) -> None:
    """Check that image and mask exist and that their headers give the same size and EXIF orientation.

    Raises:
        DataError: a file is missing or unreadable, the mask is DICOM, or sizes or orientations differ.
        EnvironmentIssue: the image is DICOM and pydicom is not installed.
    """
    sizes = {name: _read_size(path, f"{where}: {name}") for name, path in (("image", image), ("mask", mask))}
    if is_dicom_file(mask):
        raise DataError(f"{where}: mask {mask} is a DICOM file. Save it as a gray PNG of 0 and 255.")
    if sizes["image"] != sizes["mask"]:
        shown = {name: f"{width}x{height}" for name, (width, height) in sizes.items()}
        raise DataError(
            f"{where}: mask {mask} is {shown['mask']} pixels, its image {shown['image']} (width x height). "
            "Both must have the same size."
        )
    try:
        orientation = {name: image_orientation(path) for name, path in (("image", image), ("mask", mask))}
    except ImageError:
        return  # damaged after the header: reported when the file is read
    if orientation["image"] != orientation["mask"]:
        raise DataError(
            f"{where}: image {image} has EXIF orientation {orientation['image']}, its mask {orientation['mask']}. "
            "Rotate the pixels of both upright and save them without the orientation."
        )


def list_images(folder: Path) -> dict[str, Path]:
    """Return the image files directly in a folder by name, sorted, without hidden files.

    Raises:
        DataError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}, which the layout requires. Restore it, or name another layout.")
    return {path.name: path for path in sorted(folder.iterdir()) if is_image_file(path)}


def name_some(names: Iterable[str]) -> str:
    """Format the first few names and the number of the others: `a, b, c and 4 more`."""
    every = list(names)
    rest = len(every) - SHOWN_NAMES
    return ", ".join(every[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _read_size(path: Path, what: str) -> tuple[int, int]:
    """Return width and height from the header; raise DataError with `what` in the message."""
    if not is_file(path):
        raise DataError(f"{what} {shown(path)} does not exist. Correct the table or restore the file.")
    try:
        return image_size(path)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
