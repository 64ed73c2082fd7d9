"""Evaluate a checkpoint, or a bundle on any backend, on one split of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import installed_versions, utc_now
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.threads import set_torch_threads
from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.errors import BundleError, DataError, ImageError, UsageError
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS, METHOD, Estimate
from cclip_deploy.evaluation.controls import make_controls
from cclip_deploy.evaluation.metrics import BOUNDARY_TOLERANCE_PX
from cclip_deploy.evaluation.split import ExampleCase, MeasurementOptions, Measurements, OnImage, measure_split
from cclip_deploy.evaluation.summary import EmptyPolicy, Evaluation, summarize

if TYPE_CHECKING:
    from cclip_deploy.evaluation.models import EvaluatedModel
    from cclip_deploy.runtime.registry import BackendConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The network to evaluate, and how to run it.

    Attributes:
        path: Folder of a bundle or file of a checkpoint.
        runs: Backend and device of a bundle; ONNX Runtime on the CPU if not given.
        precision: Precision of a bundle's graphs or engines.
        threads: Threads of PyTorch, or of ONNX Runtime if `runs` is not given.
        image_hw: Image size of a checkpoint; by default the one stored in it, or 224x224.
        prompt_length: Prompt length of a checkpoint; by default the one stored in it, or 32.
    """

    path: Path
    runs: BackendConfig | None = None
    precision: Precision = Precision.FP32
    threads: int | None = None
    image_hw: tuple[int, int] | None = None
    prompt_length: int | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """Rows to evaluate, and settings of the metrics."""

    split: str = "test"
    data_set: DataSetOptions = DETECTED
    """How the data set's folder is read."""
    threshold: float | None = None
    empty: EmptyPolicy = "one"
    tolerance_px: float = BOUNDARY_TOLERANCE_PX
    worst: int = 8
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError if a number is out of range."""
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UsageError(f"The threshold {self.threshold} is not between 0 and 1. Omit it to use the network's.")
        if not self.tolerance_px >= 0:
            raise UsageError(f"The boundary tolerance is {self.tolerance_px} pixels. It must be 0 or more.")
        if self.worst < 0 or self.seed < 0:
            raise UsageError("The number of worst cases and the seed must be 0 or more.")


@dataclass(frozen=True)
class DataFacts:
    """Description of the evaluated split."""

    folder: str
    layout: str
    split: str
    rows: int
    images: int
    patients: int
    patients_known: bool
    empty_masks: int
    repaired_prompts: int
    cut_prompts: int


@dataclass(frozen=True)
class EvaluationResult:
    """Results of an evaluation, from which a report is written."""

    network: dict[str, Any]
    data: DataFacts
    options: EvaluationOptions
    threshold: float
    samples: tuple[Sample, ...]
    measurements: Measurements
    evaluation: Evaluation
    seconds: float
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": 1,
            "created": utc_now(),
            "command": self.command,
            "versions": installed_versions(),
            "seconds": round(self.seconds, 1),
            "network": self.network,
            "data": self.data.__dict__,
            "policy": {
                "threshold": self.threshold,
                "empty_reference": self.options.empty,
                "boundary_tolerance_px": self.options.tolerance_px,
                "interval": METHOD,
                "seed": self.options.seed,
            },
            "warnings": self.warnings(),
            "failed": [{"image": str(path), "error": reason} for path, reason in self.measurements.failed],
            **self.evaluation.to_dict(),
            "worst": [self._case_to_dict(case) for case in self.measurements.worst],
            "invented": [self._case_to_dict(case) for case in self.measurements.false_positives],
        }

    def warnings(self) -> list[str]:
        """Return reasons why the results are incomplete or their intervals unreliable."""
        data, scores, found = self.data, self.evaluation.scores, []
        if self.measurements.failed:
            found.append(f"Images that could not be read were skipped with their rows: {self.describe_failures()}")
        few = [f.name for f in fields(scores) if getattr(scores, f.name).few_patients]
        if data.patients < 2:
            found.append("There is only one patient, so there are no intervals.")
        elif few:
            named = "The split" if data.patients < FEW_PATIENTS else ", ".join(few)
            found.append(
                f"Fewer than {FEW_PATIENTS} patients: {named}. The intervals are wide, and for skewed scores their "
                "coverage is below 95 %; see docs/evaluation.md."
            )
        if not data.patients_known:
            found.append(
                "Patients are unknown, so each image counts as one. Intervals are too narrow if a patient has several."
            )
        return found

    def describe_failures(self) -> str:
        """Return the number of images that could not be read, and the first reason."""
        failed = self.measurements.failed
        return f"{len(failed)} of {len(failed) + self.data.images}; first: {failed[0][1]}"

    def _case_to_dict(self, case: ExampleCase) -> dict[str, Any]:
        sample, overlap = self.samples[case.row], self.measurements.rows[case.row].overlap
        values = {"image": str(sample.image), "text": sample.text, "dice": overlap.dice}
        return {**values, "predicted_pixels": overlap.predicted}


@dataclass(frozen=True)
class DiceScores:
    """Mean Dice over rows with their own prompts and with all other prompts, and the paired difference."""

    true: Estimate
    shuffled: Estimate
    drop: Estimate


def evaluate(
    config: NetworkConfig,
    folder: Path,
    options: EvaluationOptions,
    command: str = "",
    on_progress: Callable[[str], None] = lambda message: None,
    on_image: OnImage = lambda path, number, total: None,
) -> EvaluationResult:
    """Evaluate a network on a split of a data set, with all prompt controls and one pass per image.

    Raises:
        DataError: the data set lacks the split or a mask, or does not match its layout.
        ImageError: no image could be read; if only some could not, the result lists them.
        UsageError: an option is out of range or does not apply to this kind of network.
        EnvironmentIssue: a package is missing.
    """
    options.check()
    started_s = time.monotonic()
    on_progress(f"Reading {folder}")
    data = read_data_set(folder, options.data_set)
    samples = of_split(data.samples, options.split)
    repaired = sum(data.samples[row].split == options.split for row, _ in data.repaired)
    on_progress(f"Opening {config.path}")
    with open_network(config) as network:
        threshold = network.threshold if options.threshold is None else options.threshold
        controls = make_controls([sample.text for sample in samples], options.seed)
        settings = MeasurementOptions(threshold, options.tolerance_px, options.worst, leave_out_failures=True)
        measurements = measure_split(network, samples, controls, settings, on_image)
        description = network.describe()
    if not measurements.rows:
        raise ImageError(measurements.failed[0][1])
    samples = [samples[row] for row in measurements.sample_indices]
    controls = [control.of_rows(measurements.sample_indices) for control in controls]
    on_progress("Computing intervals over patients")
    return EvaluationResult(
        network=description,
        data=_describe(folder, data.layout, options.split, samples, measurements, repaired),
        options=options,
        threshold=threshold,
        samples=tuple(samples),
        measurements=measurements,
        evaluation=summarize(measurements, samples, controls, options.empty, options.seed),
        seconds=time.monotonic() - started_s,
        command=command,
    )


def evaluate_dice(network: EvaluatedModel, samples: Sequence[Sample], *, seed: int = 0) -> DiceScores:
    """Return Dice at the network's threshold with each row's own prompt and with all other prompts of the split.

    The image encoder runs once per image. `seed` is the bootstrap's.

    Raises:
        DataError: there are no rows, or all rows have the same prompt.
    """
    if not samples:
        raise DataError("There is nothing to evaluate: the split has no rows. Choose another split.")
    shuffled = make_controls([sample.text for sample in samples], seed)[0]
    if shuffled.missing is not None:
        raise DataError(f"There are no other prompts to compare with: {shuffled.missing}. Evaluate more varied rows.")
    settings = MeasurementOptions(network.threshold, BOUNDARY_TOLERANCE_PX, worst=0)
    measurements = measure_split(network, samples, [shuffled], settings)
    (score,) = summarize(measurements, samples, [shuffled], "one", seed).controls
    return DiceScores(score.true_dice, score.dice, score.difference)


@contextmanager
def open_network(config: NetworkConfig) -> Iterator[EvaluatedModel]:
    """Open a bundle's folder or a checkpoint's file, and close its backend at the end of the block.

    Raises:
        BundleError: the path does not exist.
        UsageError: an option does not apply to this kind of network, or the bundle lacks the precision.
        EnvironmentIssue: the backend is not installed or cannot use the device, and no fallback is allowed.
    """
    if not config.path.exists():
        raise BundleError(f"There is no {config.path}. Give a bundle's folder or a checkpoint's file.")
    if config.path.is_dir():
        with _open_bundle(config) as network:
            yield network
    else:
        yield _open_checkpoint(config)


@contextmanager
def _open_bundle(config: NetworkConfig) -> Iterator[EvaluatedModel]:
    from cclip_deploy.evaluation.models import BundleModel
    from cclip_deploy.runtime.registry import BackendConfig, opened

    if config.image_hw is not None or config.prompt_length is not None:
        raise UsageError("A bundle has a fixed image size and prompt length; those options are for a checkpoint.")
    bundle = Bundle.open(config.path)
    with opened(config.runs or BackendConfig(threads=config.threads), bundle, config.precision) as runs:
        yield BundleModel(bundle, runs)


def _open_checkpoint(config: NetworkConfig) -> EvaluatedModel:
    if config.runs is not None or config.precision != "fp32":
        raise UsageError(
            "A checkpoint runs only in PyTorch on the CPU in FP32. Export it, and evaluate the bundle with that "
            "backend and precision."
        )
    from cclip_deploy.environment.packages import require_export_packages

    require_export_packages()
    from cclip_deploy.evaluation.models import CheckpointModel
    from cclip_deploy.inference.describe_prompt import open_tokenizer
    from cclip_deploy.model.checkpoint import load_checkpoint
    from cclip_deploy.model.config import InputForm

    loaded = load_checkpoint(config.path)
    trained = loaded.form or InputForm()
    form = InputForm(config.image_hw or trained.image_hw, config.prompt_length or trained.prompt_length)
    tokenizer, _ = open_tokenizer(None, form.prompt_length)
    set_torch_threads(config.threads)
    return CheckpointModel(loaded, form, tokenizer)


def _describe(
    folder: Path, layout: str, split: str, samples: list[Sample], measurements: Measurements, repaired: int
) -> DataFacts:
    return DataFacts(
        folder=str(folder),
        layout=layout,
        split=split,
        rows=len(samples),
        images=len({sample.image for sample in samples}),
        patients=len({sample.subject for sample in samples}),
        patients_known=any(sample.patient is not None for sample in samples),
        empty_masks=sum(row.overlap.reference == 0 for row in measurements.rows),
        repaired_prompts=repaired,
        cut_prompts=sum(row.cut for row in measurements.rows),
    )
