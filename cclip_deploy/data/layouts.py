"""Data-set layouts: from a folder to referrals, that is an image, a sentence, and the mask of what it refers to."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cclip_deploy.data.images import check_pixel_count, decoding
from cclip_deploy.errors import DataError

TABLE_NAME = "table.csv"
REQUIRED_COLUMNS = ("image", "mask", "text")
FLAT_COLUMNS = (*REQUIRED_COLUMNS, "split", "subject")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Referral:
    """One row of a data set: what `text` names in `image` is drawn in `mask`."""

    image: Path
    mask: Path
    text: str
    split: str
    subject: str


def read_flat(folder: Path) -> list[Referral]:
    """Read the flat layout: a CSV table in `folder`, with the columns image, mask, text and perhaps split, subject.

    Paths are relative to the folder. Without a split column every row is of the split "train"; without a subject
    column every image is a subject of its own. An image may have several rows, each with another text. Row numbers in
    messages count the header as row 1, as a spreadsheet shows them.

    Raises:
        DataError: no table or several, an unknown, missing or doubled column, an empty table or field, a missing file,
            a mask of another size than its image, the same text twice for one image, an unknown split.
    """
    table = _find_table(folder)
    referrals: list[Referral] = []
    seen: dict[tuple[Path, str], int] = {}
    for number, row in enumerate(_read_rows(table), start=2):
        where = f"{table}, row {number}"
        referral = _read_referral(folder, row, where)
        first = seen.setdefault((referral.image, referral.text), number)
        if first != number:
            raise DataError(
                f"{where}: {referral.image.name} has the text {referral.text!r} in row {first} too. Keep one."
            )
        referrals.append(referral)
    return referrals


def of_split(referrals: Sequence[Referral], split: str) -> list[Referral]:
    """The referrals of one split; DataError if there are none."""
    chosen = [referral for referral in referrals if referral.split == split]
    if not chosen:
        held = ", ".join(sorted({referral.split for referral in referrals})) or "none"
        raise DataError(f"The data set has no rows of split {split!r}; its splits: {held}. Add rows of that split.")
    return chosen


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A grey PNG mask, 0 outside and one other value (1 or 255, as a rule) inside: (H, W) bool.

    Raises:
        DataError: more than two values, or two that are not 0 and another, such as a greyscale picture has.
        ImageError: the file cannot be decoded.
    """
    with decoding(path), Image.open(path) as image:
        check_pixel_count(path, *image.size)
        if image.mode not in {"1", "L", "P", "I;16", "I"}:
            raise DataError(f"Mask {path} has colour mode {image.mode}. Save it as a grey PNG of 0 and 255.")
        values = np.asarray(image)
    inside = np.setdiff1d(values, [0])
    if len(inside) > 1:
        raise DataError(
            f"Mask {path} has {len(inside)} values besides 0 ({', '.join(map(str, inside[:4]))}, ...). "
            "A mask is 0 outside and one other value inside: threshold it first."
        )
    return np.asarray(values != 0)


def _find_table(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"There is no data-set folder {folder}. Check the path.")
    tables = sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise DataError(
            f"{folder} must hold one .csv table; found: {found}. The flat layout has {', '.join(FLAT_COLUMNS)}."
        )
    return tables[0]


def _read_rows(table: Path) -> list[dict[str, str]]:
    """All rows by column; a byte-order mark of a spreadsheet program is passed over."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{table} cannot be read as a CSV table in UTF-8: {error}. Save it again as CSV, UTF-8."
        ) from error
    while lines and not any(lines[-1]):
        lines.pop()
    if len(lines) < 2:
        raise DataError(f"{table} is empty: a header and at least one row are expected.")
    header = [name.strip() for name in lines[0]]
    _check_header(table, header)
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(
                f"{table}, row {number} has {len(line)} fields, the header {len(header)}. Quote texts that hold commas."
            )
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _check_header(table: Path, header: Sequence[str]) -> None:
    for name in header:
        if name not in FLAT_COLUMNS:
            raise DataError(f"{table}, row 1: unknown column {name!r}. Columns are {', '.join(FLAT_COLUMNS)}.")
        if header.count(name) > 1:
            raise DataError(f"{table}, row 1: column {name!r} stands there twice. Keep one.")
    for name in REQUIRED_COLUMNS:
        if name not in header:
            raise DataError(f"{table}, row 1: column {name!r} is missing; there are {', '.join(header)}. Add it.")


def _read_referral(folder: Path, row: dict[str, str], where: str) -> Referral:
    values = {name: value.strip() for name, value in row.items()}
    for name, value in values.items():
        if not value:
            raise DataError(f"{where}: {name} is empty. Fill it in, or remove the row.")
    split = values.get("split", "train")
    if split not in SPLITS:
        raise DataError(f"{where}: unknown split {split!r}. Splits are {', '.join(SPLITS)}.")
    image, mask = folder / values["image"], folder / values["mask"]
    _check_sizes(image, mask, where)
    return Referral(image, mask, values["text"], split, values.get("subject", values["image"]))


def _check_sizes(image: Path, mask: Path, where: str) -> None:
    sizes = {name: _read_size(path, f"{where}: {name}") for name, path in (("image", image), ("mask", mask))}
    if sizes["image"] != sizes["mask"]:
        shown = {name: f"{width}x{height}" for name, (width, height) in sizes.items()}
        raise DataError(
            f"{where}: mask {mask} is {shown['mask']} pixels, its image {shown['image']} (width x height). "
            "Give the mask of this very image."
        )


def _read_size(path: Path, what: str) -> tuple[int, int]:
    """Width and height, as the file's header says them."""
    if not path.is_file():
        raise DataError(f"{what} {path} does not exist. Correct the table or restore the file.")
    try:
        with decoding(path), Image.open(path) as image:
            return image.size
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
