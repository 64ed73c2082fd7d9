"""Index of what `predict` wrote: `predictions.json`, `.csv` and `.parquet` beside the masks."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cclip_deploy.common.csv_text import csv_text
from cclip_deploy.common.files import disk_problem, replace_together
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.names import printable
from cclip_deploy.environment.packages import require_packages
from cclip_deploy.errors import UsageError
from cclip_deploy.inference.prediction import Predictions

NAME, FORMATS = "predictions", ("json", "csv", "parquet")
SCHEMA = "cclip-deploy/predictions/1"
_FILES = ("mask", "probability", "overlay", "explanation")
_TYPES = {
    "image": "string", "prompt": "string", **dict.fromkeys(_FILES, "string"), "area_share": "float64",
    "area_px": "int64", "area_mm2": "float64", "mean_probability": "float64", "mean_probability_inside": "float64",
    "left": "int64", "top": "int64", "right": "int64", "bottom": "int64", "region_count": "int64",
    "warnings": "string", "error": "string",
}  # fmt: skip
"""Columns of the CSV and Parquet files, with their types in Parquet."""


def check_formats(formats: Sequence[str]) -> None:
    """Check the formats of an index before any work.

    Raises:
        UsageError: a format is unknown.
        EnvironmentIssue: pyarrow, which writes Parquet, is not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"{name!r} is not a format of the index. Name some of {','.join(FORMATS)}, or none.")
    if "parquet" in formats:
        require_packages("An index in Parquet", ("pyarrow",), "parquet")


def index_paths(folder: Path, formats: Sequence[str]) -> list[Path]:
    """Return the paths that `write_index` writes."""
    return [folder / f"{NAME}.{name}" for name in FORMATS if name in formats]


def write_index(folder: Path, formats: Sequence[str], predictions: Predictions, ran: dict[str, Any]) -> None:
    """Write the index of a run to its output folder; all formats are replaced together.

    Paths of images are absolute; those of written files are relative to `folder`, so that it can be moved. An image
    that could not be used is a row with an error in CSV and Parquet, and listed under "failed" in JSON.

    Args:
        folder: output folder of the run.
        formats: some of `FORMATS`.
        predictions: the outcome.
        ran: backend and precision, for the JSON file.

    Raises:
        EnvironmentIssue: the disk is full or the folder cannot be written.
    """
    document = predictions.to_dict()
    for row in document["predictions"]:
        row["files"] = {what: printable(os.path.basename(path)) for what, path in row["files"].items()}
    for row in (*document["predictions"], *document["failed"]):
        row["image"] = printable(os.path.abspath(row["image"]))
    rows = [_flat(row) for row in (*document["predictions"], *document["failed"])]
    encode = {
        "json": lambda: json_text({"schema": SCHEMA, **document, "ran": ran}).encode(),
        "csv": lambda: _csv(rows),
        "parquet": lambda: _parquet(rows),
    }
    paths = index_paths(folder, formats)
    try:
        replace_together({path: encode[path.suffix[1:]]() for path in paths})
    except OSError as error:
        raise disk_problem(paths[0], error) from error


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the JSON form with the columns of `_TYPES`."""
    box = dict(zip(("left", "top", "right", "bottom"), row.get("box") or (), strict=False))
    found = {**row, **row.get("files", {}), **box, "warnings": " ".join(row.get("warnings", ())) or None}
    return {column: found.get(column) for column in _TYPES}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    cells = (["" if value is None else value for value in row.values()] for row in rows)
    return csv_text([list(_TYPES), *cells]).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(column, getattr(pyarrow, kind)()) for column, kind in _TYPES.items()])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), file)
    return file.getvalue()
