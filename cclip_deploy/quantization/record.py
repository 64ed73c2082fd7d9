"""Calibration record: images, method and ranges, as one link in a bundle's chain of hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cclip_deploy.bundle.bundle import RECORD_BYTES, Bundle
from cclip_deploy.bundle.manifest import CalibrationEntry, GraphEntry
from cclip_deploy.common.toml_file import StrictModel
from cclip_deploy.datasets.image_sets import ImageSource, counted
from cclip_deploy.errors import BundleError
from cclip_deploy.graph.precision.ranges import Method


class CalibrationPicture(StrictModel):
    """An image: its name, the hashes of its file and of its decoded pixels, and its patient if known."""

    name: str
    sha256: str
    pixels_sha256: str
    patient: str | None = None


class CalibrationImages(StrictModel):
    """The images of a calibration, and the evaluation images they were checked against.

    Attributes:
        pictures: in the order of their hashes.
        sources: data sets and folders of the images; empty in records of earlier versions.
        evaluation_pictures: number of evaluation images in the comparison, none of which is shared.
        evaluation_sources: data sets and folders of those.
        failed: one sentence for each unreadable image of either set, with the reason.
    """

    pictures: tuple[CalibrationPicture, ...]
    sources: tuple[ImageSource, ...] = ()
    evaluation_pictures: int
    evaluation_sources: tuple[ImageSource, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def patients(self) -> int:
        """Number of known patients."""
        return len({picture.patient for picture in self.pictures} - {None})

    def describe(self) -> list[str]:
        """Return lines that describe the images, their sources, and whether patients could be compared."""
        taken = counted(len(self.pictures), "image") + (
            f" of {counted(self.patients, 'patient')}" if self.patients else ""
        )
        lines = [f"Calibration: {taken}, from {_join(self.sources)}"]
        if self.evaluation_sources:
            lines.append(f"Evaluation set: {_join(self.evaluation_sources)}")
            unknown = sum(source.images_without_patient for source in (*self.sources, *self.evaluation_sources))
            if unknown:
                lines.append(
                    f"{unknown:,} of these images have no known patient, so only their files and pixels were "
                    "compared. Give --subject, or a subject column."
                )
        return lines + [f"Left out: {reason}" for reason in self.failed]

    def facts(self) -> dict[str, Any]:
        """Return counts and sources in plain JSON form."""
        sources = self.model_dump(
            mode="json", include={"sources", "evaluation_pictures", "evaluation_sources", "failed"}
        )
        return {"pictures": len(self.pictures), "patients": self.patients, **sources}


class CalibrationRecord(CalibrationImages):
    """Everything from which the scales of a quantized graph follow.

    `graph_sha256` is the hash of the FP32 graph that ran. A range is the largest absolute value that a tensor's codes
    represent.
    """

    schema_version: int = 1
    graph: str
    graph_sha256: str
    method: Method
    percentile: float | None
    ranges: dict[str, float]


def write_record(record: CalibrationRecord, file: str, folder: Path) -> CalibrationEntry:
    """Write a record into the folder of a bundle under construction."""
    from cclip_deploy.common.files import sha256_file

    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return CalibrationEntry(file=file, sha256=sha256_file(folder / file))


def read_record(bundle: Bundle, graph: GraphEntry) -> CalibrationRecord:
    """Return the calibration record of a quantized graph, after checking its hash.

    Raises:
        BundleError: there is no valid record, or it belongs to another graph.
    """
    if graph.calibration is None:
        raise BundleError(f"{graph.file} has no calibration record. Build it again.")
    path, content = bundle.path / graph.calibration.file, bundle.read(graph.calibration.file, RECORD_BYTES)
    try:
        record = CalibrationRecord.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{path} is not a calibration record: {error.errors()[0]['msg']}. Build it again.") from error
    if record.graph_sha256 != graph.made_from_sha256:
        raise BundleError(f"{path} was made with another graph than {graph.file} was made from. Build it again.")
    return record


def _join(sources: tuple[ImageSource, ...]) -> str:
    return "; ".join(source.describe() for source in sources) or "a version that did not record it"
