"""Read the layouts of LViT and LanGuideMedSeg: a table of mask names and texts; images are found by mask name.

LViT names a mask like its image with the prefix `mask_` (QaTa-COV19) or with the suffix `.png` (MosMedData+).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.read_log import ReadLog
from cclip_deploy.datasets.sample import Sample, check_sizes, list_images, name_some, subject_of
from cclip_deploy.datasets.tables import TEXT_SUFFIXES, Row, read_roles
from cclip_deploy.errors import DataError
from cclip_deploy.imaging.reading import image_stem

LVIT_FOLDERS = {"train": "Train_Folder", "val": "Val_Folder", "test": "Test_Folder"}
TRAIN_FRACTION = 0.8
"""LanGuideMedSeg trains on the first int(0.8 n) rows of the train table and validates on the others."""
Described = tuple[Row, str, str]


def has_lvit(folder: Path) -> bool:
    """Return whether a folder has LViT's layout."""
    return any((folder / name).is_dir() for name in LVIT_FOLDERS.values())


def has_languidemedseg(folder: Path) -> bool:
    """Return whether a folder has LanGuideMedSeg's layout."""
    return any((folder / "prompt" / f"{name}.csv").is_file() for name in ("train", "test"))


def read_lvit(folder: Path, options: DataSetOptions = DETECTED, log: ReadLog | None = None) -> list[Sample]:
    """Read `{Train,Val,Test}_Folder/{img,labelcol}` and tables with the columns Image (mask name) and Description.

    A table is an .xlsx, .csv, .tsv or .txt file whose name begins with Train_text, Val_text or Test_text, in the
    split's folder or next to it. QaTa-COV19 has one table for training and validation (Train_Val_text in Train_Folder);
    then, as for any train table if the validation folder has none, a row belongs to the split whose folder has its
    mask.

    Raises:
        DataError: a table is missing, ambiguous or unreadable, a mask or image of a row is missing, a mask has another
            size than its image, or a mask has two rows.
    """
    samples: list[Sample] = []
    splits = [split for split, name in LVIT_FOLDERS.items() if (folder / name).is_dir()]
    own = {split: _find_table(folder, split) for split in splits}
    for split in splits:
        if split == "val" and own["val"] is None and own.get("train"):
            continue
        table = own[split]
        if table is None:
            raise DataError(
                f"{folder / LVIT_FOLDERS[split]} has no table. Put {split.capitalize()}_text.xlsx (or .csv), with the "
                "columns Image and Description, into it."
            )
        shared = [split, "val"] if split == "train" and "val" in splits and own["val"] is None else [split]
        places = {s: (folder / LVIT_FOLDERS[s] / "img", folder / LVIT_FOLDERS[s] / "labelcol") for s in shared}
        samples += _read_samples(table, read_described(table, options, log), places, options)
    return samples


def read_languidemedseg(folder: Path, options: DataSetOptions = DETECTED, log: ReadLog | None = None) -> list[Sample]:
    """Read `{Train,Test}/{Images,GTs}` and `prompt/{train,test}.csv`; the last fifth of the train rows is validation.

    Raises:
        DataError: see `read_lvit`.
    """
    samples: list[Sample] = []
    for name in ("train", "test"):
        table = folder / "prompt" / f"{name}.csv"
        if table.is_file():
            rows = read_described(table, options, log)
            cut = int(TRAIN_FRACTION * len(rows))
            parts = {"train": rows[:cut], "val": rows[cut:]} if name == "train" else {"test": rows}
            place = (folder / name.capitalize() / "Images", folder / name.capitalize() / "GTs")
            for split, part in parts.items():
                samples += _read_samples(table, part, {split: place}, options)
    return samples


def read_described(table: Path, options: DataSetOptions = DETECTED, log: ReadLog | None = None) -> list[Described]:
    """Read a table of mask names and texts as (row, name, text).

    The names are in the column Image or Mask, or in that of --column image or mask.

    Raises:
        DataError: a column is missing or ambiguous, a field is empty, or a name is in two rows.
    """
    name_role = "mask" if options.columns.get("mask") else "image"
    rows, table_format = read_roles(table, {name_role: True, "prompt": True}, options)
    if log is not None:
        log.tables.append(table_format)
    found: list[Described] = []
    seen: dict[str, str] = {}
    for row in rows:
        for role, value in row.values.items():
            if not value:
                column = table_format.columns[role]
                raise DataError(f"{row.where}: {column} is empty. Fill it in, or remove the row.")
        name = row.values[name_role]
        first = seen.setdefault(name, row.where)
        if first != row.where:
            raise DataError(
                f"{row.where}: {name} is in {first} too, but this layout has one text per mask. Keep one row."
            )
        found.append((row, name, row.values["prompt"]))
    return found


def is_lvit_table(name: str) -> bool:
    """Return whether a file name is that of one of LViT's tables."""
    beginnings = ("train_text", "train_val_text", "val_text", "test_text")
    return name.lower().startswith(beginnings) and Path(name).suffix.lower() in {".xlsx", *TEXT_SUFFIXES}


def _find_table(folder: Path, split: str) -> Path | None:
    """Return the table of a split, or None."""
    beginnings = ("train_text", "train_val_text") if split == "train" else (f"{split}_text",)
    files = [path for place in (folder / LVIT_FOLDERS[split], folder) for path in sorted(place.iterdir())]
    tables = [path for path in files if is_lvit_table(path.name) and path.name.lower().startswith(beginnings)]
    if len(tables) > 1:
        raise DataError(f"Split {split!r} has several tables: {name_some(map(str, tables))}. Keep one.")
    return tables[0] if tables else None


def _read_samples(
    table: Path, rows: Sequence[Described], places: Mapping[str, tuple[Path, Path]], options: DataSetOptions
) -> list[Sample]:
    """Assign each row to the split whose mask folder has its mask; raise DataError for rows without a mask.

    `places` maps each split to its folders of images and masks.
    """
    images = {split: list_images(place[0]) for split, place in places.items()}
    masks = {split: list_images(place[1]) for split, place in places.items()}
    stems = {split: _by_stem(held) for split, held in images.items()}
    missing: list[str] = []
    samples: list[Sample] = []
    for row, name, text in rows:
        split = next((split for split, held in masks.items() if name in held), None)
        if split is None:
            missing.append(name)
            continue
        image = _image_of(name, images[split], stems[split], row.where)
        check_sizes(image, masks[split][name], row.where)
        subject = subject_of(image.name, options.subject_pattern)
        samples.append(Sample(image, masks[split][name], text, split, subject, options.mask_values))
    if missing:
        folders = " or ".join(str(place[1]) for place in places.values())
        raise DataError(
            f"{table}: {len(missing)} of {len(rows)} rows name masks that are not in {folders}: "
            f"{name_some(missing)}. Restore the files or remove the rows."
        )
    return samples


def _by_stem(images: Mapping[str, Path]) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    for path in images.values():
        stems.setdefault(image_stem(path.name), []).append(path)
    return stems


def _image_of(mask_name: str, images: Mapping[str, Path], stems: Mapping[str, list[Path]], where: str) -> Path:
    """Find the image of a mask: without `mask_`, then with the same name, then with the same stem."""
    bare = mask_name.removeprefix("mask_")
    for name in (bare, mask_name):
        if name in images:
            return images[name]
    for stem in (image_stem(bare), image_stem(mask_name)):
        found = stems.get(stem, [])
        if len(found) > 1:
            raise DataError(f"{where}: mask {mask_name} may belong to {name_some(p.name for p in found)}. Keep one.")
        if found:
            return found[0]
    raise DataError(f"{where}: mask {mask_name} has no image; expected {bare}. Restore it or remove the row.")
