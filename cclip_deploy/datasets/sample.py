"""What every layout is read into, and the checks that all of them share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import is_file, shown
from cclip_deploy.errors import DataError, ImageError, UsageError
from cclip_deploy.imaging.reading import has_dicom_mark, is_picture_name, picture_orientation, picture_size

SPLITS = ("train", "val", "test")
SUBJECT_PATTERNS = (
    r"sub-S\d+",  # QaTa-COV19, after BIMCV-COVID19
    r"Morozov_study_\d+",  # MosMedData+: a slice of a CT study
    r"Jun_.*case\d+",  # MosMedData+: the same
    r"patient\d+",  # CAMUS and CheXlocalize
)
"""How published data sets write the patient, or the study that stands for one, into a file's name."""
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Sample:
    """One row of a data set: what `text` names in `image` is drawn in `mask`."""

    image: Path
    mask: Path
    text: str
    split: str
    subject: str

    @property
    def patient(self) -> str | None:
        """The subject; None where the image's own name stands for it, because the patient is not known."""
        return None if self.subject.endswith(self.image.name) else self.subject


def of_split(samples: Sequence[Sample], split: str) -> list[Sample]:
    """The samples of one split; DataError if there are none."""
    chosen = [sample for sample in samples if sample.split == split]
    if not chosen:
        held = ", ".join(sorted({sample.split for sample in samples})) or "none"
        raise DataError(f"The data set has no rows of split {split!r}; its splits: {held}. Add rows of that split.")
    return chosen


def subject_of(image_name: str, pattern: str | None = None) -> str:
    """The patient in a file's name, as `patient_of`; the name itself where it has none."""
    return patient_of(image_name, pattern) or image_name


def patient_of(image_name: str, pattern: str | None = None) -> str | None:
    """The patient in a file's name (`pattern`, or SUBJECT_PATTERNS), or None.

    A pattern with a group means the group. UsageError if it is no regular expression.
    """
    for known in SUBJECT_PATTERNS if pattern is None else (pattern,):
        try:
            found = re.search(known, image_name)
        except re.error as error:
            raise UsageError(f"{known!r} is no regular expression: {error}. Example: 'sub-S\\d+'.") from error
        if found:
            patient = found[1] if found.re.groups else found[0]
            return patient and printable(patient)
    return None


def check_sizes(image: Path, mask: Path, where: str) -> None:
    """DataError unless both files exist, can be opened, and have the same size and EXIF orientation by their headers.

    EnvironmentIssue where the image is DICOM and pydicom is not installed.
    """
    sizes = {name: _read_size(path, f"{where}: {name}") for name, path in (("image", image), ("mask", mask))}
    if has_dicom_mark(mask):
        raise DataError(f"{where}: mask {mask} is a DICOM file. Save it as a gray PNG of 0 and 255.")
    if sizes["image"] != sizes["mask"]:
        shown = {name: f"{width}x{height}" for name, (width, height) in sizes.items()}
        raise DataError(
            f"{where}: mask {mask} is {shown['mask']} pixels, its image {shown['image']} (width x height). "
            "Give the mask of this very image."
        )
    try:
        turned = {name: picture_orientation(path) for name, path in (("image", image), ("mask", mask))}
    except ImageError:
        return  # behind its header a file is torn, which is that picture's failure when it is read
    if turned["image"] != turned["mask"]:
        raise DataError(
            f"{where}: image {image} has EXIF orientation {turned['image']}, its mask {turned['mask']}: one would be "
            "turned and the other not. Turn the pixels of both upright and save them without the orientation."
        )


def list_pictures(folder: Path) -> dict[str, Path]:
    """The pictures right in a folder by name, sorted, hidden ones left out; DataError if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}, which the layout has. Restore it, or name another layout.")
    return {path.name: path for path in sorted(folder.iterdir()) if is_picture_name(path)}


def name_some(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are."""
    every = list(names)
    rest = len(every) - SHOWN_NAMES
    return ", ".join(every[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _read_size(path: Path, what: str) -> tuple[int, int]:
    """Width and height, as the file's header says them."""
    if not is_file(path):
        raise DataError(f"{what} {shown(path)} does not exist. Correct the table or restore the file.")
    try:
        return picture_size(path)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
