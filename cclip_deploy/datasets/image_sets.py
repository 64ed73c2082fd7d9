"""Images named by files, folders or data sets, with their prompts and patients: what calibrates and what judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cclip_deploy.common.files import sha256_input
from cclip_deploy.common.names import printable
from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.datasets.reading import LAYOUTS, has_layout, read_data_set
from cclip_deploy.datasets.sample import Sample, patient_of
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import find_pictures, picture_stem

MASK_FOLDERS = frozenset({
    "mask", "masks", "labelcol", "label", "labels", "gt", "gts", "groundtruth", "ground_truth", "ground-truth",
    "segmentation", "segmentations",
})  # fmt: skip
MASK_BEGINNINGS = ("mask_", "mask-")
MASK_ENDS = ("_mask", "-mask", "_gt", "_segmentation")
"""Names that published data sets, and `predict`, give to masks and their folders; compared in lower case."""


@dataclass(frozen=True)
class SetImage:
    """One image; `prompts` are the data set's own, and `patient` is None where it is not known."""

    path: Path
    prompts: tuple[str, ...] = ()
    patient: str | None = None


class ImageSource(StrictModel):
    """What was found under one path: a data set's split, or a folder or file that belongs to no data set.

    Attributes:
        name: of the folder or file.
        layout: of the data set; None for plain images.
        split: that was taken; None for plain images.
        images: how many there are.
        patients: how many are known.
        images_without_patient: images of which neither a column nor the file's name says the patient.
    """

    name: str
    layout: str | None = None
    split: str | None = None
    images: int
    patients: int
    images_without_patient: int

    def describe(self) -> str:
        """The same as a phrase: `films (layout flat, split train): 64 images of 60 patients`."""
        kind = f"layout {self.layout}, split {self.split}" if self.layout else "images without a layout"
        return f"{self.name} ({kind}): {counted(self.images, 'image')} of {self._describe_patients()}"

    def _describe_patients(self) -> str:
        if not self.images_without_patient:
            return counted(self.patients, "patient")
        if not self.patients:
            return "unknown patients"
        return f"{counted(self.patients, 'patient')}, and {self.images_without_patient:,} without a known patient"


@dataclass(frozen=True)
class DataSetOptions:
    """How data-set folders are read.

    Attributes:
        layout: one of LAYOUTS, for every folder; found from each folder unless given.
        subject_pattern: regular expression for the patient in an image's name.
        allow_outside: whether tables may name files outside the folder.
    """

    layout: str | None = None
    subject_pattern: str | None = None
    allow_outside: bool = False


@dataclass(frozen=True)
class ImageSet:
    """Images, each file once, and where they came from."""

    images: tuple[SetImage, ...]
    sources: tuple[ImageSource, ...]

    @property
    def patients(self) -> frozenset[str]:
        """The patients that are known."""
        return frozenset(image.patient for image in self.images if image.patient is not None)

    def by_hash(self) -> dict[str, SetImage]:
        """The images by the SHA-256 of their files, in the order of these; of equal files the first is taken."""
        found = {sha256_input(image.path): image for image in reversed(self.images)}
        return {sha256: found[sha256] for sha256 in sorted(found)}

    def limited(self, limit: int) -> ImageSet:
        """At most `limit` different images of as many patients as possible; names of files do not matter."""
        turns: Counter[str] = Counter()
        ranked: list[tuple[int, str, SetImage]] = []
        for sha256, image in self.by_hash().items():
            owner = image.patient or sha256
            ranked.append((turns[owner], sha256, image))
            turns[owner] += 1
        return replace(self, images=tuple(image for *_, image in sorted(ranked, key=lambda r: r[:2])[:limit]))


def counted(count: int, noun: str) -> str:
    """`1 image`, `2,113 images`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def read_image_set(paths: Sequence[Path], split: str, options: DataSetOptions = DataSetOptions()) -> ImageSet:
    """Read the images that files and folders name.

    A folder with a layout is a data set, of which the split is taken; one without rows of that split is taken whole if
    it has a single other split, unless that is its test split. Any other folder is searched for images to the bottom.

    Raises:
        DataError: a data set is broken or lacks the split; a folder holds masks, or a data set below it.
        ImageError: a path does not exist or a folder has no image.
        UsageError: no path was given, an unknown layout, or a pattern that is no regular expression.
    """
    images: dict[Path, SetImage] = {}
    sources = []
    for path in paths:
        data_set = path.is_dir() and (options.layout is not None or has_layout(path))
        found, source = _read_split(path, split, options) if data_set else _read_plain(path, options)
        sources.append(source)
        for image in found:
            known = images.setdefault(image.path.resolve(), image)
            prompts = tuple(dict.fromkeys((*known.prompts, *image.prompts)))
            images[image.path.resolve()] = replace(known, prompts=prompts)
    return ImageSet(tuple(images.values()), tuple(sources))


def _read_split(folder: Path, split: str, options: DataSetOptions) -> tuple[list[SetImage], ImageSource]:
    data_set = read_data_set(folder, options.layout, options.subject_pattern, options.allow_outside)
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
            f"{folder} has no rows of split {split!r}; its splits: {', '.join(sorted(held))}. Name a data set that has "
            "them, or a folder of images alone."
        )
    return only


def _read_plain(path: Path, options: DataSetOptions) -> tuple[list[SetImage], ImageSource]:
    found = find_pictures([path])
    if path.is_dir():
        _refuse_data_set_below(path, found)
        _refuse_masks(path, found)
    images = [SetImage(picture, (), patient_of(picture.name, options.subject_pattern)) for picture in found]
    return images, _describe(path, images, None, None)


def _refuse_data_set_below(folder: Path, pictures: Iterable[Path]) -> None:
    """Masks and test images of a data set must not pass for plain images because its parent was named."""
    below = {parent for picture in pictures for parent in picture.relative_to(folder).parents}
    for place in sorted(folder / parent for parent in below if parent.parts):
        if has_layout(place):
            raise DataError(
                f"{folder} is no data set itself but holds one in {place}. Name that folder, or a folder of images "
                "alone."
            )


def _refuse_masks(folder: Path, pictures: Iterable[Path]) -> None:
    masks = [picture for picture in pictures if _looks_like_mask(picture, folder)]
    if masks:
        looks = "; ".join(f"{name}: {layout.looks}" for name, layout in LAYOUTS.items())
        raise DataError(
            f"{folder} has no data-set layout, and {len(masks)} of the images below it look like masks (first "
            f"{masks[0]}). Name the folder of the images alone, or a data set. What each layout is known by: {looks}."
        )


def _looks_like_mask(picture: Path, folder: Path) -> bool:
    places = (folder.resolve().name, *picture.relative_to(folder).parts[:-1])
    stem = picture_stem(picture.name).lower()
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
