"""Tuned precision profiles: the result of a sensitivity search, stored as TOML.

The top-level keys are those of the profiles in engines/profiles/; the section `tuned` describes the search.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tomli_w

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.toml_file import StrictModel, read_toml
from cclip_deploy.datasets.image_sets import ImageSource
from cclip_deploy.errors import UsageError
from cclip_deploy.graph.precision.ranges import Method
from cclip_deploy.quantization.calibrate import CalibrationOptions, choose_pictures
from cclip_deploy.runtime.tensorrt.binding import BindingName


class Agreement(StrictModel):
    """Dice to FP32's masks: mean over all masks, its standard error over images, and lowest mean of an image."""

    mean: float
    worst: float
    standard_error: float = 0.0

    def as_good_as(self, other: Agreement) -> bool:
        """Return whether neither the mean nor the worst image is lower than in `other`."""
        return self.mean >= other.mean and self.worst >= other.worst


class ParetoPoint(StrictModel):
    """A point of the Pareto front: an image encoder with some blocks in the higher precision.

    Attributes:
        kept: blocks in the higher precision.
        share: fraction of the image encoder's multiply-adds in the low precision.
        tuning: agreement on the tuning images.
        held_out: agreement on the held-out images.
    """

    kept: tuple[str, ...]
    share: float
    tuning: Agreement
    held_out: Agreement


class CalibrationUsed(StrictModel):
    """The calibration of a search; images by the SHA-256 of their files."""

    method: Method
    percentile: float | None = None
    pictures: tuple[str, ...]
    sources: tuple[ImageSource, ...] = ()


class Tuning(StrictModel):
    """The search: its graph, images, budget and Pareto front.

    `damage` is 1 minus the mean Dice on the tuning images with that block alone in the low precision. `tuning_patients`
    and `held_out_patients` count the known patients of each half.
    """

    graph_sha256: str
    budget: Agreement
    share: float
    tuning: Agreement
    held_out: Agreement
    tuning_pictures: tuple[str, ...]
    held_out_pictures: tuple[str, ...]
    tuning_patients: int | None = None
    held_out_patients: int | None = None
    sources: tuple[ImageSource, ...] = ()
    calibration: CalibrationUsed | None = None
    damage: dict[str, float]
    front: tuple[ParetoPoint, ...]

    def cheaper_equivalent(self) -> ParetoPoint | None:
        """Return the cheapest point that is as good on the held-out images, if it is cheaper than the chosen one."""
        cheaper = (point for point in self.front if point.share > self.share)
        return next((point for point in cheaper if point.held_out.as_good_as(self.held_out)), None)


class TunedProfile(StrictModel):
    """Input of `build-engine --tuned`: the precision, the blocks in a higher one, and how they were found."""

    name: str
    why: str
    backend: BindingName = "tensorrt-rtx"
    precision: Precision
    keep: tuple[str, ...] = ()
    tuned: Tuning

    def check_bundle(self, bundle: Bundle) -> None:
        """Raise UsageError unless the profile was tuned for this bundle's image encoder."""
        found = bundle.graph("image_encoder").sha256
        if found != self.tuned.graph_sha256:
            raise UsageError(
                f"The profile was tuned for another image encoder (SHA-256 {self.tuned.graph_sha256[:12]}…, this "
                f"bundle's is {found[:12]}…). Run tune-precision on this bundle."
            )

    def calibration_options(self, given: CalibrationOptions | None) -> CalibrationOptions | None:
        """Return options that repeat the calibration of the search on the given images.

        Raises:
            UsageError: the given images differ from those of the search.
        """
        used = self.tuned.calibration
        if used is None or given is None:
            return given
        wanted = replace(given, method=used.method, limit=len(used.pictures), allow_few=True)
        if used.percentile is not None:
            wanted = replace(wanted, percentile=used.percentile)
        chosen = tuple(picture.sha256 for picture in choose_pictures(wanted).pictures)
        if chosen != used.pictures:
            raise UsageError(
                f"The profile was tuned with other calibration images ({len(set(chosen) & set(used.pictures))} of "
                f"{len(used.pictures)} are the same). Give the --calibration of tune-precision, or run it again."
            )
        return wanted


def read_tuned_profile(path: Path) -> TunedProfile:
    """Read a profile; raise DataError if there is none, or UsageError that names an unknown, missing or invalid key."""
    absent = f"There is no profile {path}. Make one: cclip-deploy tune-precision BUNDLE -o {path}"
    return read_toml(path, TunedProfile, absent, " Run tune-precision again.")


def write_tuned_profile(profile: TunedProfile, path: Path) -> None:
    """Write a profile as TOML, atomically; raise EnvironmentIssue if it cannot be written."""
    with whole_file(path) as unfinished:
        unfinished.write_text(tomli_w.dumps(profile.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
