"""The profile that a sensitivity search writes: what stays in a higher precision, and all that this was found from.

Its first keys are those of the profiles in engines/profiles/; the section `tuned` is the search's own.
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
    """Dice to FP32's masks: the mean over all masks, its standard error by picture, and the worst picture's mean."""

    mean: float
    worst: float
    standard_error: float = 0.0

    def as_good_as(self, other: Agreement) -> bool:
        """Whether neither the mean nor the worst image is lower."""
        return self.mean >= other.mean and self.worst >= other.worst


class FrontPoint(StrictModel):
    """One form of the network: its blocks in the higher precision, and what is left in the low one.

    Attributes:
        kept: blocks in the higher precision.
        share: of the image encoder's multiply-adds, in the low precision.
        tuning: on the pictures that decided.
        held_out: on pictures that decided nothing.
    """

    kept: tuple[str, ...]
    share: float
    tuning: Agreement
    held_out: Agreement


class CalibrationUsed(StrictModel):
    """What the ranges came from; images by the SHA-256 of their files."""

    method: Method
    percentile: float | None = None
    pictures: tuple[str, ...]
    sources: tuple[ImageSource, ...] = ()


class Tuning(StrictModel):
    """The search: the graph that it was made for, the pictures, the budget, and the front.

    `damage` is what each block costs when it alone is in the low precision: 1 minus the mean Dice on the tuning part.
    `tuning_patients` and `held_out_patients` count the known patients of each part, none of whom is in both.
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
    front: tuple[FrontPoint, ...]

    def cheaper_as_good_when_judged(self) -> FrontPoint | None:
        """The form with the fewest blocks that is as good on the held-out part, if it has fewer than the chosen one."""
        cheaper = (point for point in self.front if point.share > self.share)
        return next((point for point in cheaper if point.held_out.as_good_as(self.held_out)), None)


class TunedProfile(StrictModel):
    """What `build-engine --tuned` takes: the precision, the blocks kept out of it, and how they were found."""

    name: str
    why: str
    backend: BindingName = "tensorrt-rtx"
    precision: Precision
    keep: tuple[str, ...] = ()
    tuned: Tuning

    def check_bundle(self, bundle: Bundle) -> None:
        """UsageError where the bundle's image encoder is not the graph that was tuned."""
        found = bundle.graph("image_encoder").sha256
        if found != self.tuned.graph_sha256:
            raise UsageError(
                f"The profile was found for another image encoder (SHA-256 {self.tuned.graph_sha256[:12]}…, this "
                f"bundle's is {found[:12]}…). Run tune-precision on this bundle."
            )

    def calibration_options(self, given: CalibrationOptions | None) -> CalibrationOptions | None:
        """The calibration that the profile was found with, on the pictures given.

        Raises:
            UsageError: none were given, or others than the search was made with.
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
                f"The profile was found with other calibration images ({len(set(chosen) & set(used.pictures))} of "
                f"{len(used.pictures)} are the same). Give --calibration as tune-precision had it, or run it again."
            )
        return wanted


def read_tuned_profile(path: Path) -> TunedProfile:
    """Read a profile; UsageError names the key that is unknown, missing or wrong."""
    absent = f"There is no profile {path}. Make one: cclip-deploy tune-precision BUNDLE -o {path}"
    return read_toml(path, TunedProfile, absent, " Run tune-precision again.")


def write_tuned_profile(profile: TunedProfile, path: Path) -> None:
    """Write a profile as TOML, completely or not at all; EnvironmentIssue where the disk does not take it."""
    with whole_file(path) as unfinished:
        unfinished.write_text(tomli_w.dumps(profile.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
