"""Read the flat layout: one CSV or JSON Lines table with image, mask and text in each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cclip_deploy.common.paths import check_inside
from cclip_deploy.datasets.sample import SPLITS, Sample, check_sizes, subject_of
from cclip_deploy.datasets.tables import Row, read_table
from cclip_deploy.errors import DataError

TABLE_NAME, JSON_TABLE_NAME = "table.csv", "table.jsonl"
REQUIRED_COLUMNS = ("image", "mask", "text")
FLAT_COLUMNS = (*REQUIRED_COLUMNS, "split", "subject")


def find_tables(folder: Path) -> list[Path]:
    """Return the .csv and .jsonl files directly in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in {".csv", ".jsonl"} and path.is_file())


def read_flat(folder: Path, subject_pattern: str | None = None, allow_outside: bool = False) -> list[Sample]:
    """Read the only table in `folder`, with the columns image, mask, text and, optionally, split and subject.

    Paths are relative to the folder; absolute ones and those with `..` need `allow_outside`. The default split is
    "train". The default subject is taken from the image's name (see `sample.subject_of`). An image may have several
    rows with different texts. In JSON Lines the columns are keys, and each row may omit the optional ones.

    Raises:
        DataError: no table or several, an unknown, missing or repeated column, an empty table or field, a missing file,
            a file outside the folder, a mask of another size than its image, a repeated text for one image, or an
            unknown split.
    """
    table = _find_table(folder)
    samples: list[Sample] = []
    seen: dict[tuple[Path, str], str] = {}
    rows = read_table(table)
    if table.suffix.lower() == ".csv":
        _check_columns(f"{table}, row 1", rows[0].values)
    for row in rows:
        sample = _read_sample(folder, row, subject_pattern, allow_outside)
        first = seen.setdefault((sample.image, sample.text), row.where)
        if first != row.where:
            number = first.rpartition(" ")[2]
            raise DataError(
                f"{row.where}: {sample.image.name} has the text {sample.text!r} in row {number} too. Keep one."
            )
        samples.append(sample)
    return samples


def _find_table(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"There is no data-set folder {folder}. Check the path.")
    tables = find_tables(folder)
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise DataError(
            f"{folder} must have exactly one .csv or .jsonl table; found: {found}. "
            f"The columns of the flat layout are {', '.join(FLAT_COLUMNS)}."
        )
    return tables[0]


def _check_columns(where: str, columns: Iterable[str]) -> None:
    held = list(columns)
    for name in held:
        if name not in FLAT_COLUMNS:
            raise DataError(f"{where}: unknown column {name!r}. Columns are {', '.join(FLAT_COLUMNS)}.")
    for name in REQUIRED_COLUMNS:
        if name not in held:
            raise DataError(f"{where}: column {name!r} is missing; its columns are {', '.join(held)}. Add it.")


def _read_sample(folder: Path, row: Row, subject_pattern: str | None, allow_outside: bool) -> Sample:
    _check_columns(row.where, row.values)
    values: Mapping[str, str] = {name: value.strip() for name, value in row.values.items()}
    for name, value in values.items():
        if not value:
            raise DataError(f"{row.where}: {name} is empty. Fill it in, or remove the row.")
    split = values.get("split", "train")
    if split not in SPLITS:
        raise DataError(f"{row.where}: unknown split {split!r}. Splits are {', '.join(SPLITS)}.")
    image, mask = (check_inside(folder, values[name], row.where, allow_outside) for name in ("image", "mask"))
    check_sizes(image, mask, row.where)
    subject = values.get("subject") or subject_of(values["image"], subject_pattern)
    return Sample(image, mask, values["text"], split, subject)
