"""Collect images from files, folders and data sets, with prompts and patients, for calibration and precision tuning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cclip_deploy.common.files import sha256_input
from cclip_deploy.common.names import printable
from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.reading import LAYOUTS, has_layout, read_data_set
from cclip_deploy.datasets.sample import Sample, patient_of
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import find_images, image_stem

MASK_FOLDERS = frozenset({
    "mask", "masks", "labelcol", "label", "labels", "gt", "gts", "groundtruth", "ground_truth", "ground-truth",
    "segmentation", "segmentations",
})  # fmt: skip
MASK_BEGINNINGS = ("mask_", "mask-")
MASK_ENDS = ("_mask", "-mask", "_gt", "_segmentation")
"""Names of masks and their folders in published data sets and in `predict`'s output; compared in lower case."""


@dataclass(frozen=True)
class SetImage:
    """One image with the prompts of its data set; `patient` is None if it is not known."""

    path: Path
    prompts: tuple[str, ...] = ()
    patient: str | None = None


class ImageSource(StrictModel):
    """Summary of the images under one path: a split of a data set, or plain images in a folder or file.

    Attributes:
        name: name of the folder or file.
        layout: layout of the data set; None for plain images.
        split: split that was used; None for plain images.
        images: number of images.
        patients: number of known patients.
        images_without_patient: number of images whose patient is unknown.
    """

    name: str
    layout: str | None = None
    split: str | None = None
    images: int
    patients: int
    images_without_patient: int

    def describe(self) -> str:
        """Format as text: `xrays (layout flat, split train): 64 images of 60 patients`."""
        kind = f"layout {self.layout}, split {self.split}" if self.layout else "images without a layout"
        return f"{self.name} ({kind}): {counted(self.images, 'image')} of {self._describe_patients()}"

    def _describe_patients(self) -> str:
        if not self.images_without_patient:
            return counted(self.patients, "patient")
        if not self.patients:
            return "unknown patients"
        return f"{counted(self.patients, 'patient')}, and {self.images_without_patient:,} without a known patient"


@dataclass(frozen=True)
class ImageSet:
    """Images without duplicate files, and their sources."""

    images: tuple[SetImage, ...]
    sources: tuple[ImageSource, ...]

    @property
    def patients(self) -> frozenset[str]:
        """The known patients."""
        return frozenset(image.patient for image in self.images if image.patient is not None)

    def by_hash(self) -> dict[str, SetImage]:
        """Return the images by SHA-256 of their files, sorted by it; the first of identical files is used."""
        found = {sha256_input(image.path): image for image in reversed(self.images)}
        return {sha256: found[sha256] for sha256 in sorted(found)}

    def limited(self, limit: int) -> ImageSet:
        """Select at most `limit` distinct images of as many patients as possible, independent of file names."""
        taken: Counter[str] = Counter()
        ranked: list[tuple[int, str, SetImage]] = []
        for sha256, image in self.by_hash().items():
            patient = image.patient or sha256
            ranked.append((taken[patient], sha256, image))
            taken[patient] += 1
        return replace(self, images=tuple(image for *_, image in sorted(ranked, key=lambda r: r[:2])[:limit]))


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: `1 image`, `2,113 images`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def read_image_set(paths: Sequence[Path], split: str, options: DataSetOptions = DETECTED) -> ImageSet:
    """Collect the images of files and folders.

    Of a folder with a data-set layout, `split` is used; if it has only one other split, that one is used, except for
    the test split. Any other folder is searched recursively for images.

    Raises:
        DataError: a data set is invalid or lacks the split, or a folder of images contains masks or a data set.
        ImageError: a path does not exist, or a folder has no image.
        UsageError: no path was given, the layout is unknown, or the pattern is not a regular expression.
    """
    images: dict[Path, SetImage] = {}
    sources = []
    for path in paths:
        data_set = path.is_dir() and (options.layout or options.table or has_layout(path))
        found, source = _read_split(path, split, options) if data_set else _read_plain(path, options)
        sources.append(source)
        for image in found:
            known = images.setdefault(image.path.resolve(), image)
            prompts = tuple(dict.fromkeys((*known.prompts, *image.prompts)))
            images[image.path.resolve()] = replace(known, prompts=prompts)
    return ImageSet(tuple(images.values()), tuple(sources))


def _read_split(folder: Path, split: str, options: DataSetOptions) -> tuple[list[SetImage], ImageSource]:
    data_set = read_data_set(folder, options)
    taken = _choose_split(folder, {sample.split for sample in data_set.samples}, split)
    rows: dict[Path, list[Sample]] = {}
    for sample in data_set.samples:
        if sample.split == taken:
            rows.setdefault(sample.image, []).append(sample)
    images = [SetImage(path, tuple(r.text for r in own), own[0].patient) for path, own in rows.items()]
    return images, _describe(folder, images, data_set.layout, taken)


def _choose_split(folder: Path, held: set[str], split: str) -> str:
    if split in held:
        return split
    only = next(iter(held)) if len(held) == 1 else "test"
    if only == "test":
        raise DataError(
            f"{folder} has no rows of split {split!r}; its splits: {', '.join(sorted(held))}. Name a data set with "
            "this split, or a folder with images only."
        )
    return only


def _read_plain(path: Path, options: DataSetOptions) -> tuple[list[SetImage], ImageSource]:
    found = find_images([path])
    if path.is_dir():
        _refuse_data_set_below(path, found)
        _refuse_masks(path, found)
    images = [SetImage(image, (), patient_of(image.name, options.subject_pattern)) for image in found]
    return images, _describe(path, images, None, None)


def _refuse_data_set_below(folder: Path, images: Iterable[Path]) -> None:
    """Raise DataError if a subfolder is a data set, whose masks and test images would count as plain images."""
    below = {parent for image in images for parent in image.relative_to(folder).parents}
    for place in sorted(folder / parent for parent in below if parent.parts):
        if has_layout(place):
            raise DataError(
                f"{folder} is not a data set but contains one in {place}. Name that folder, or a folder with images "
                "only."
            )


def _refuse_masks(folder: Path, images: Iterable[Path]) -> None:
    masks = [image for image in images if _looks_like_mask(image, folder)]
    if masks:
        looks = "; ".join(f"{name}: {layout.looks}" for name, layout in LAYOUTS.items())
        raise DataError(
            f"{folder} has no data-set layout, and {len(masks)} of the images below it look like masks (first "
            f"{masks[0]}). Name a folder with images only, or a data set. Layouts are recognized by: {looks}."
        )


def _looks_like_mask(image: Path, folder: Path) -> bool:
    places = (folder.resolve().name, *image.relative_to(folder).parts[:-1])
    stem = image_stem(image.name).lower()
    return (
        any(place.lower() in MASK_FOLDERS for place in places)
        or stem.startswith(MASK_BEGINNINGS)
        or stem.endswith(MASK_ENDS)
    )


def _describe(path: Path, images: Sequence[SetImage], layout: str | None, split: str | None) -> ImageSource:
    return ImageSource(
        name=printable(path.resolve().name),
        layout=layout,
        split=split,
        images=len(images),
        patients=len({image.patient for image in images} - {None}),
        images_without_patient=sum(image.patient is None for image in images),
    )
