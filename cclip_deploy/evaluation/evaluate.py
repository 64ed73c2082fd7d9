"""Evaluate: a checkpoint, or a bundle on any backend, on one split of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import installed_versions, utc_now
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.common.threads import set_torch_threads
from cclip_deploy.datasets.reading import read_data_set
from cclip_deploy.datasets.sample import Sample, of_split
from cclip_deploy.errors import BundleError, ImageError, UsageError
from cclip_deploy.evaluation.bootstrap import FEW_PATIENTS, METHOD
from cclip_deploy.evaluation.controls import make_controls
from cclip_deploy.evaluation.metrics import BOUNDARY_TOLERANCE_PX
from cclip_deploy.evaluation.split import Measurements, MeasuringOptions, OnImage, ShownCase, measure_split
from cclip_deploy.evaluation.summary import EmptyPolicy, Evaluation, summarize

if TYPE_CHECKING:
    from cclip_deploy.evaluation.models import EvaluatedModel
    from cclip_deploy.runtime.registry import BackendConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The network to evaluate, and how it runs.

    Attributes:
        path: a bundle's folder or a checkpoint's file.
        runs: of a bundle: backend and device; ONNX Runtime on the CPU unless given.
        precision: of a bundle's graphs or engines.
        threads: of PyTorch; of ONNX Runtime where `runs` is not given.
        image_hw: of a checkpoint; as it was trained, else 224x224, unless given.
        prompt_length: of a checkpoint; as it was trained, else 32, unless given.
    """

    path: Path
    runs: BackendConfig | None = None
    precision: Precision = Precision.FP32
    threads: int | None = None
    image_hw: tuple[int, int] | None = None
    prompt_length: int | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of which rows."""

    split: str = "test"
    layout: str | None = None
    subject_pattern: str | None = None
    threshold: float | None = None
    empty: EmptyPolicy = "one"
    tolerance_px: float = BOUNDARY_TOLERANCE_PX
    worst: int = 8
    seed: int = 0
    allow_outside: bool = False
    """Whether the data set's tables may name files outside its folder."""

    def check(self) -> None:
        """UsageError where a number means nothing."""
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UsageError(f"A threshold of {self.threshold} is not between 0 and 1. Leave it out for the usual one.")
        if not self.tolerance_px >= 0:
            raise UsageError(f"A boundary tolerance of {self.tolerance_px} pixels means nothing. Use 0 or more.")
        if self.worst < 0 or self.seed < 0:
            raise UsageError("Neither the number of worst cases nor the seed can be negative.")


@dataclass(frozen=True)
class DataFacts:
    """What was evaluated on."""

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
    """All that a report is made of."""

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
        """Plain JSON form."""
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
            "worst": [self._show_case(case) for case in self.measurements.worst],
            "invented": [self._show_case(case) for case in self.measurements.invented],
        }

    def warnings(self) -> list[str]:
        """Why intervals may cover the true values less often than they claim, or are missing."""
        data, scores, found = self.data, self.evaluation.scores, []
        if self.measurements.failed:
            found.append(f"Pictures that could not be used, their rows left out: {self.describe_failures()}")
        few = [f.name for f in fields(scores) if getattr(scores, f.name).few_patients]
        if data.patients < 2:
            found.append("There is one patient alone, so there are no intervals.")
        elif few:
            named = "The split" if data.patients < FEW_PATIENTS else ", ".join(few)
            found.append(
                f"Fewer than {FEW_PATIENTS} patients: {named}. The intervals are wide, and for skewed scores they "
                "cover the true value less often than 95 %; docs/evaluation.md has the numbers."
            )
        if not data.patients_known:
            found.append("No patients are known: each image counts as one, so intervals are too narrow if they repeat.")
        return found

    def describe_failures(self) -> str:
        """How many pictures could not be used, and the first of them with its reason."""
        failed = self.measurements.failed
        return f"{len(failed)} of {len(failed) + self.data.images}; first: {failed[0][1]}"

    def _show_case(self, case: ShownCase) -> dict[str, Any]:
        sample, overlap = self.samples[case.row], self.measurements.rows[case.row].overlap
        shown = {"image": str(sample.image), "text": sample.text, "dice": overlap.dice}
        return {**shown, "predicted_pixels": overlap.predicted}


def evaluate(
    choice: NetworkConfig,
    folder: Path,
    options: EvaluationOptions,
    command: str = "",
    on_progress: Callable[[str], None] = lambda message: None,
    on_image: OnImage = lambda path, number, total: None,
) -> EvaluationResult:
    """Measure a network on a split of a data set, with the prompt controls; one pass over each picture.

    Raises:
        DataError: the data set lacks the split, a mask, or is otherwise not what its layout has.
        ImageError: no picture could be used; where some could, the result names the others.
        UsageError: an option that does not belong to what is evaluated.
        EnvironmentIssue: a package is missing.
    """
    options.check()
    started_s = time.monotonic()
    on_progress(f"Reading {folder}")
    data = read_data_set(folder, options.layout, options.subject_pattern, options.allow_outside)
    samples = of_split(data.samples, options.split)
    repaired = sum(data.samples[row].split == options.split for row, _ in data.repaired)
    on_progress(f"Opening {choice.path}")
    with open_network(choice) as network:
        threshold = network.threshold if options.threshold is None else options.threshold
        controls = make_controls([sample.text for sample in samples], options.seed)
        measuring = MeasuringOptions(threshold, options.tolerance_px, options.worst, leave_out_failures=True)
        measurements = measure_split(network, samples, controls, measuring, on_image)
        described = network.describe()
    if not measurements.kept:
        raise ImageError(measurements.failed[0][1])
    samples = [samples[row] for row in measurements.kept]
    controls = [control.of_rows(measurements.kept) for control in controls]
    on_progress("Computing intervals over patients")
    return EvaluationResult(
        network=described,
        data=_describe(folder, data.layout, options.split, samples, measurements, repaired),
        options=options,
        threshold=threshold,
        samples=tuple(samples),
        measurements=measurements,
        evaluation=summarize(measurements, samples, controls, options.empty, options.seed),
        seconds=time.monotonic() - started_s,
        command=command,
    )


@contextmanager
def open_network(choice: NetworkConfig) -> Iterator[EvaluatedModel]:
    """The network of a bundle's folder or a checkpoint's file, closed at the end.

    Raises:
        BundleError: there is nothing at the path.
        UsageError: an option of the other kind, or a precision that the bundle does not have.
        EnvironmentIssue: the backend is not installed or cannot use the device, and no fallback is allowed.
    """
    if not choice.path.exists():
        raise BundleError(f"There is no {choice.path}. Give a bundle's folder or a checkpoint's file.")
    if choice.path.is_dir():
        with _open_bundle(choice) as network:
            yield network
    else:
        yield _open_checkpoint(choice)


@contextmanager
def _open_bundle(choice: NetworkConfig) -> Iterator[EvaluatedModel]:
    from cclip_deploy.evaluation.models import BundleModel
    from cclip_deploy.runtime.registry import BackendConfig, opened

    if choice.image_hw is not None or choice.prompt_length is not None:
        raise UsageError("A bundle has its image size and prompt length itself; those options are for a checkpoint.")
    bundle = Bundle.open(choice.path)
    with opened(choice.runs or BackendConfig(threads=choice.threads), bundle, choice.precision) as runs:
        yield BundleModel(bundle, runs)


def _open_checkpoint(choice: NetworkConfig) -> EvaluatedModel:
    if choice.runs is not None or choice.precision != "fp32":
        raise UsageError(
            "A checkpoint runs in PyTorch on the CPU, in FP32. Export it, and give the bundle with that backend and "
            "precision."
        )
    from cclip_deploy.environment.packages import require_export_packages

    require_export_packages()
    from cclip_deploy.evaluation.models import CheckpointModel
    from cclip_deploy.inference.describe_prompt import open_tokenizer
    from cclip_deploy.model.checkpoint import load_checkpoint
    from cclip_deploy.model.config import InputForm

    loaded = load_checkpoint(choice.path)
    trained = loaded.form or InputForm()
    form = InputForm(choice.image_hw or trained.image_hw, choice.prompt_length or trained.prompt_length)
    tokenizer, _ = open_tokenizer(None, form.prompt_length)
    set_torch_threads(choice.threads)
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
