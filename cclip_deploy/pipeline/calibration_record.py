"""The calibration record: which pictures, which method, what ranges; a link in a bundle's chain of hashes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.graph.calibration import Method
from cclip_deploy.manifest import CalibrationEntry, GraphEntry


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationPicture(_Record):
    """A picture by name, by the hash of its file, and by that of its decoded pixels."""

    name: str
    sha256: str
    pixels_sha256: str


class CalibrationRecord(_Record):
    """All that the scales of a quantised graph came from.

    `graph_sha256` is that of the FP32 graph that ran; `evaluation_pictures` is how many pictures it was checked not to
    share. A range is the largest absolute value that a tensor's codes stand for.
    """

    schema_version: int = 1
    graph: str
    graph_sha256: str
    method: Method
    percentile: float | None
    pictures: tuple[CalibrationPicture, ...]
    evaluation_pictures: int
    ranges: dict[str, float]


def write_record(record: CalibrationRecord, file: str, folder: Path) -> CalibrationEntry:
    """Write a record into a bundle that is being made."""
    from cclip_deploy.files import sha256_file

    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return CalibrationEntry(file=file, sha256=sha256_file(folder / file))


def read_record(bundle: Bundle, graph: GraphEntry) -> CalibrationRecord:
    """The record of a quantised graph, its checksum verified.

    Raises:
        BundleError: it is no record, or one of another graph.
    """
    if graph.calibration is None:
        raise BundleError(f"{graph.file} does not say what it was calibrated with. Build it again.")
    path = bundle.file(graph.calibration.file)
    try:
        record = CalibrationRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path} is no calibration record: {error.errors()[0]['msg']}. Build it again.") from error
    if record.graph_sha256 != graph.made_from_sha256:
        raise BundleError(f"{path} was made with another graph than {graph.file} was made from. Build it again.")
    return record
