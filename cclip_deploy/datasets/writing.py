"""Write synthetic images, masks and prompts in any of the data-set formats that can be read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cclip_deploy.common.csv_text import csv_text, escape_formula
from cclip_deploy.datasets.flat import FLAT_COLUMNS, JSON_TABLE_NAME, TABLE_NAME
from cclip_deploy.datasets.lvit import LVIT_FOLDERS, TRAIN_FRACTION
from cclip_deploy.datasets.sample import SPLITS
from cclip_deploy.errors import EnvironmentIssue, UsageError

DESCRIBED = ("Image", "Description")
OWN_NAME_EVERY = 5
"""Every n-th mask of the QaTa-COV19 layout has the name of its image, as some published ones do."""
IMAGES_PER_SPLIT = 30_000
"""Subject numbers have five digits, divided among three splits."""


@dataclass(frozen=True)
class SyntheticImage:
    """One image with its number in the split and its masks and prompts."""

    split: str
    number: int
    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    targets: tuple[tuple[npt.NDArray[np.bool_], str], ...]

    @property
    def name(self) -> str:
        """File stem, unique in the data set."""
        return f"{self.split}-{self.number:05d}"

    @property
    def qata_name(self) -> str:
        """File stem in the form of QaTa-COV19, with subject and session."""
        number = SPLITS.index(self.split) * IMAGES_PER_SPLIT + self.number
        return f"sub-S{number:05d}_ses-E{number:05d}_run-1_bp-chest_vp-ap_dx"


def check_layout(layout: str, counts: Mapping[str, int], prompts_per_image: int) -> None:
    """Raise UsageError if the layout is unknown or cannot hold these splits or this many prompts per image."""
    if layout not in WRITERS:
        raise UsageError(f"Unknown layout {layout!r}. Layouts to write are {', '.join(WRITERS)}.")
    if layout in ONE_PROMPT and prompts_per_image > 1:
        raise UsageError(f"Layout {layout} holds one prompt per image, not {prompts_per_image}. Use flat or medvlsm.")
    if max(counts.values()) > IMAGES_PER_SPLIT:
        raise UsageError(f"{max(counts.values())} images are too many for a split. Use {IMAGES_PER_SPLIT} or fewer.")
    train, val = counts.get("train", 0), counts.get("val", 0)
    if layout == "qata" and val and not train:
        raise UsageError("Layout qata stores the validation table in Train_Folder. Generate training images too.")
    if layout == "languidemedseg" and int(TRAIN_FRACTION * (train + val)) != train:
        raise UsageError(
            f"Layout languidemedseg takes the last fifth of {train + val} images for validation, which leaves "
            f"{int(TRAIN_FRACTION * (train + val))} for training, not {train}. Use four times the validation images."
        )


def write_layout(folder: Path, layout: str, images: Iterable[SyntheticImage]) -> None:
    """Create `folder` and write the images into it; masks are 8-bit PNG files of 0 and 255."""
    folder.mkdir(parents=True)
    WRITERS[layout](folder, images)


def _write_flat(folder: Path, images: Iterable[SyntheticImage]) -> None:
    with (folder / TABLE_NAME).open("w", newline="", encoding="utf-8") as file:
        for row in chain([FLAT_COLUMNS], _flat_rows(folder, images)):
            file.write(csv_text([row], "\r\n"))


def _write_json_lines(folder: Path, images: Iterable[SyntheticImage]) -> None:
    with (folder / JSON_TABLE_NAME).open("w", encoding="utf-8") as file:
        for row in _flat_rows(folder, images):
            file.write(json.dumps(dict(zip(FLAT_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n")


def _flat_rows(folder: Path, images: Iterable[SyntheticImage]) -> Iterator[tuple[str, ...]]:
    """Write each image and yield its table rows."""
    for item in images:
        image = f"images/{item.name}.png"
        _save_image(folder / image, item.image)
        for index, (mask, prompt) in enumerate(item.targets):
            mask_name = f"masks/{item.name}-{index}.png"
            _save_mask(folder / mask_name, mask)
            yield image, mask_name, prompt, item.split, f"synthetic-{item.name}"


def _write_qata(folder: Path, images: Iterable[SyntheticImage]) -> None:
    """Write LViT's QaTa-COV19 layout: one table for training and validation, in Train_Folder."""
    rows: dict[str, list[tuple[str, str]]] = {"Train_Val": [], "Test": []}
    for item in images:
        place = folder / LVIT_FOLDERS[item.split]
        mask, prompt = item.targets[0]
        name = f"{item.qata_name}.png"
        mask_name = name if item.number % OWN_NAME_EVERY == OWN_NAME_EVERY - 1 else f"mask_{name}"
        _save_image(place / "img" / name, item.image)
        _save_mask(place / "labelcol" / mask_name, mask)
        rows["Test" if item.split == "test" else "Train_Val"].append((mask_name, prompt))
    for part, described in rows.items():
        if described:
            home = LVIT_FOLDERS["test" if part == "Test" else "train"]
            _write_xlsx(folder / home / f"{part}_text.xlsx", described)


def _write_mosmed(folder: Path, images: Iterable[SyntheticImage]) -> None:
    """Write LViT's MosMedData+ layout: a table per split, JPEG images, and PNG masks of the same stem."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for item in images:
        place = folder / LVIT_FOLDERS[item.split]
        mask, prompt = item.targets[0]
        number = SPLITS.index(item.split) * IMAGES_PER_SPLIT + item.number
        stem = f"Morozov_study_{number:04d}_{item.number % 40}"
        _save_image(place / "img" / f"{stem}.jpg", item.image)
        _save_mask(place / "labelcol" / f"{stem}.png", mask)
        rows.setdefault(item.split, []).append((f"{stem}.png", prompt))
    for split, described in rows.items():
        _write_xlsx(folder / LVIT_FOLDERS[split] / f"{split.capitalize()}_text.xlsx", described)


def _write_languidemedseg(folder: Path, images: Iterable[SyntheticImage]) -> None:
    rows: dict[str, list[tuple[str, str]]] = {}
    for item in images:
        part = "Test" if item.split == "test" else "Train"
        mask, prompt = item.targets[0]
        _save_image(folder / part / "Images" / f"{item.qata_name}.png", item.image)
        _save_mask(folder / part / "GTs" / f"mask_{item.qata_name}.png", mask)
        rows.setdefault(part, []).append((f"mask_{item.qata_name}.png", prompt))
    (folder / "prompt").mkdir()
    for part, described in rows.items():
        table = csv_text([DESCRIBED, *described], "\r\n")
        (folder / "prompt" / f"{part.lower()}.csv").write_text(table, encoding="utf-8", newline="")


def _write_medvlsm(folder: Path, images: Iterable[SyntheticImage]) -> None:
    entries: dict[str, list[dict[str, Any]]] = {}
    for item in images:
        image = f"{item.name}.png"
        _save_image(folder / "images" / image, item.image)
        for index, (mask, prompt) in enumerate(item.targets):
            mask_name = f"{item.name}-{index}.png"
            _save_mask(folder / "masks" / mask_name, mask)
            prompts = {"p0": "", "p1": prompt, "p2": [prompt]}
            entries.setdefault(item.split, []).append({"img_name": image, "mask_name": mask_name, "prompts": prompts})
    (folder / "anns").mkdir()
    for split, listed in entries.items():
        (folder / "anns" / f"{split}.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")


def _save_image(path: Path, image: npt.NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # `quality` is ignored by PNG.
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(path, quality=95)


def _save_mask(path: Path, mask: npt.NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path)


def _write_xlsx(path: Path, described: Sequence[tuple[str, str]]) -> None:
    """Write a workbook with the columns Image and Description; equal rows give equal bytes."""
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentIssue(
            "Writing Excel tables needs openpyxl. Install it: pip install 'cclip-deploy[evaluate]'"
        ) from error
    book = openpyxl.Workbook()
    for row in (DESCRIBED, *described):
        book.active.append([escape_formula(cell) for cell in row])
    book.save(path)
    _forget_times(path)


def _forget_times(path: Path) -> None:
    """Remove timestamps from a workbook: those of the archive and the document properties."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    parts["docProps/core.xml"] = (
        b'<?xml version="1.0" encoding="UTF-8"?><cp:coreProperties xmlns:cp='
        b'"http://schemas.openxmlformats.org/package/2006/metadata/core-properties"/>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


WRITERS: Mapping[str, Callable[[Path, Iterable[SyntheticImage]], None]] = {
    "flat": _write_flat,
    "jsonl": _write_json_lines,
    "qata": _write_qata,
    "mosmed": _write_mosmed,
    "languidemedseg": _write_languidemedseg,
    "medvlsm": _write_medvlsm,
}
ONE_PROMPT = frozenset({"qata", "mosmed", "languidemedseg"})
