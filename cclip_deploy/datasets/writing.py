"""Films, masks and prompts written in every layout that is read, names and all, so that one generator tests each."""

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
from cclip_deploy.datasets.lvit import LVIT_FOLDERS, TRAIN_SHARE
from cclip_deploy.datasets.sample import SPLITS
from cclip_deploy.errors import EnvironmentIssue, UsageError

DESCRIBED = ("Image", "Description")
OWN_NAME_EVERY = 5
"""Every so many masks of the QaTa-COV19 layout have the image's own name, as some published ones do."""
FILMS_PER_SPLIT = 30_000
"""Numbers of subjects of five digits, shared out to three splits."""


@dataclass(frozen=True)
class WrittenFilm:
    """A film, its number in its split, and its prompts with their masks."""

    split: str
    number: int
    image: npt.NDArray[np.float32]  # (H, W) in [0, 1]
    asked: tuple[tuple[npt.NDArray[np.bool_], str], ...]

    @property
    def name(self) -> str:
        """A file's stem that no other film of the set has."""
        return f"{self.split}-{self.number:05d}"

    @property
    def qata_name(self) -> str:
        """The same in the form of QaTa-COV19, which carries subject and session."""
        number = SPLITS.index(self.split) * FILMS_PER_SPLIT + self.number
        return f"sub-S{number:05d}_ses-E{number:05d}_run-1_bp-chest_vp-ap_dx"


def check_layout(layout: str, counts: Mapping[str, int], prompts_per_film: int) -> None:
    """UsageError where a layout is unknown or cannot hold so many prompts or such splits."""
    if layout not in WRITERS:
        raise UsageError(f"Unknown layout {layout!r}. Layouts to write are {', '.join(WRITERS)}.")
    if layout in ONE_PROMPT and prompts_per_film > 1:
        raise UsageError(f"Layout {layout} holds one prompt an image, not {prompts_per_film}. Use flat or medvlsm.")
    if max(counts.values()) > FILMS_PER_SPLIT:
        raise UsageError(f"{max(counts.values())} films in a split are too many. Use {FILMS_PER_SPLIT} or fewer.")
    train, val = counts.get("train", 0), counts.get("val", 0)
    if layout == "qata" and val and not train:
        raise UsageError("Layout qata keeps the validation's table in Train_Folder. Draw films for training too.")
    if layout == "languidemedseg" and int(TRAIN_SHARE * (train + val)) != train:
        raise UsageError(
            f"Layout languidemedseg takes the last fifth of {train + val} films for validation, which leaves "
            f"{int(TRAIN_SHARE * (train + val))} for training, not {train}. Draw four times as many as for validation."
        )


def write_layout(folder: Path, layout: str, films: Iterable[WrittenFilm]) -> None:
    """Write films into a folder, which is made; masks are 8-bit PNG of 0 and 255."""
    folder.mkdir(parents=True)
    WRITERS[layout](folder, films)


def _write_flat(folder: Path, films: Iterable[WrittenFilm]) -> None:
    with (folder / TABLE_NAME).open("w", newline="", encoding="utf-8") as file:
        for row in chain([FLAT_COLUMNS], _flat_rows(folder, films)):
            file.write(csv_text([row], "\r\n"))


def _write_json_lines(folder: Path, films: Iterable[WrittenFilm]) -> None:
    with (folder / JSON_TABLE_NAME).open("w", encoding="utf-8") as file:
        for row in _flat_rows(folder, films):
            file.write(json.dumps(dict(zip(FLAT_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n")


def _flat_rows(folder: Path, films: Iterable[WrittenFilm]) -> Iterator[tuple[str, ...]]:
    """Writes each film as its rows are asked for."""
    for film in films:
        image = f"images/{film.name}.png"
        _save_image(folder / image, film.image)
        for index, (mask, prompt) in enumerate(film.asked):
            mask_name = f"masks/{film.name}-{index}.png"
            _save_mask(folder / mask_name, mask)
            yield image, mask_name, prompt, film.split, f"synthetic-{film.name}"


def _write_qata(folder: Path, films: Iterable[WrittenFilm]) -> None:
    """As LViT's QaTa-COV19: one table for training and validation, in Train_Folder."""
    rows: dict[str, list[tuple[str, str]]] = {"Train_Val": [], "Test": []}
    for film in films:
        place = folder / LVIT_FOLDERS[film.split]
        mask, prompt = film.asked[0]
        name = f"{film.qata_name}.png"
        mask_name = name if film.number % OWN_NAME_EVERY == OWN_NAME_EVERY - 1 else f"mask_{name}"
        _save_image(place / "img" / name, film.image)
        _save_mask(place / "labelcol" / mask_name, mask)
        rows["Test" if film.split == "test" else "Train_Val"].append((mask_name, prompt))
    for part, described in rows.items():
        if described:
            home = LVIT_FOLDERS["test" if part == "Test" else "train"]
            _write_xlsx(folder / home / f"{part}_text.xlsx", described)


def _write_mosmed(folder: Path, films: Iterable[WrittenFilm]) -> None:
    """As LViT's MosMedData+: a table in every split's folder, masks of the image's stem, images of another type."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for film in films:
        place = folder / LVIT_FOLDERS[film.split]
        mask, prompt = film.asked[0]
        number = SPLITS.index(film.split) * FILMS_PER_SPLIT + film.number
        stem = f"Morozov_study_{number:04d}_{film.number % 40}"
        _save_image(place / "img" / f"{stem}.jpg", film.image)
        _save_mask(place / "labelcol" / f"{stem}.png", mask)
        rows.setdefault(film.split, []).append((f"{stem}.png", prompt))
    for split, described in rows.items():
        _write_xlsx(folder / LVIT_FOLDERS[split] / f"{split.capitalize()}_text.xlsx", described)


def _write_languidemedseg(folder: Path, films: Iterable[WrittenFilm]) -> None:
    rows: dict[str, list[tuple[str, str]]] = {}
    for film in films:
        part = "Test" if film.split == "test" else "Train"
        mask, prompt = film.asked[0]
        _save_image(folder / part / "Images" / f"{film.qata_name}.png", film.image)
        _save_mask(folder / part / "GTs" / f"mask_{film.qata_name}.png", mask)
        rows.setdefault(part, []).append((f"mask_{film.qata_name}.png", prompt))
    (folder / "prompt").mkdir()
    for part, described in rows.items():
        table = csv_text([DESCRIBED, *described], "\r\n")
        (folder / "prompt" / f"{part.lower()}.csv").write_text(table, encoding="utf-8", newline="")


def _write_medvlsm(folder: Path, films: Iterable[WrittenFilm]) -> None:
    entries: dict[str, list[dict[str, Any]]] = {}
    for film in films:
        image = f"{film.name}.png"
        _save_image(folder / "images" / image, film.image)
        for index, (mask, prompt) in enumerate(film.asked):
            mask_name = f"{film.name}-{index}.png"
            _save_mask(folder / "masks" / mask_name, mask)
            prompts = {"p0": "", "p1": prompt, "p2": [prompt]}
            entries.setdefault(film.split, []).append({"img_name": image, "mask_name": mask_name, "prompts": prompts})
    (folder / "anns").mkdir()
    for split, listed in entries.items():
        (folder / "anns" / f"{split}.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")


def _save_image(path: Path, image: npt.NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ignored by PNG; the least loss that JPEG offers.
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(path, quality=95)


def _save_mask(path: Path, mask: npt.NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path)


def _write_xlsx(path: Path, described: Sequence[tuple[str, str]]) -> None:
    """A workbook of the columns Image and Description, the same bytes at every writing."""
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentIssue(
            "Writing Excel tables needs openpyxl. Install it: pip install 'cclip-deploy[train]'"
        ) from error
    book = openpyxl.Workbook()
    for row in (DESCRIBED, *described):
        book.active.append([escape_formula(cell) for cell in row])
    book.save(path)
    _forget_times(path)


def _forget_times(path: Path) -> None:
    """Take the hour of writing out of a workbook: out of its archive, and the part that holds it."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    parts["docProps/core.xml"] = (
        b'<?xml version="1.0" encoding="UTF-8"?><cp:coreProperties xmlns:cp='
        b'"http://schemas.openxmlformats.org/package/2006/metadata/core-properties"/>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


WRITERS: Mapping[str, Callable[[Path, Iterable[WrittenFilm]], None]] = {
    "flat": _write_flat,
    "jsonl": _write_json_lines,
    "qata": _write_qata,
    "mosmed": _write_mosmed,
    "languidemedseg": _write_languidemedseg,
    "medvlsm": _write_medvlsm,
}
ONE_PROMPT = frozenset({"qata", "mosmed", "languidemedseg"})
