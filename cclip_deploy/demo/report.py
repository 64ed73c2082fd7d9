"""Results of the demo as a table, as JSON and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from cclip_deploy.benchmark.candidate import Form
from cclip_deploy.common.html_page import Figure, Section, Table, write_page
from cclip_deploy.common.json_file import json_text
from cclip_deploy.evaluation.evaluate import DiceScores
from cclip_deploy.inference.prediction import Prediction
from cclip_deploy.train.run import TrainReport
from cclip_deploy.verify.verify import Verification

TARGET_DICE = 0.75
MIN_DROP = 0.1
TARGET_TRAINING_SECONDS = 180.0
RATIO_FORMS = (Form.FUSED, Form.CACHED)
"""Forms of the bundle whose ratios the table shows; a new prompt, which the baselines encode too, comes first."""


@dataclass(frozen=True)
class Row:
    """One row of the table; `met` is None if the value has no target."""

    stage: str
    what: str
    value: str
    goal: str
    met: bool | None


@dataclass(frozen=True)
class DemoFacts:
    """Results of every stage of a demo."""

    trained: TrainReport
    scores: DiceScores
    verified: Verification
    engines: list[dict[str, Any]]
    no_engine_reason: str | None
    benched: dict[str, Any]
    predictions: list[Prediction]
    real_film: bool
    folder: Path
    total_seconds: float = 0.0

    def finished(self, total_seconds: float) -> DemoFacts:
        """Return a copy with the total time."""
        return replace(self, total_seconds=total_seconds)

    def rows(self) -> list[Row]:
        """Return the rows of the table."""
        return [*self._training_rows(), *self._parity_rows(), *self._engine_rows(), *self._latency_rows()]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; paths are relative to the folder of the demo."""
        return {
            "rows": [row.__dict__ for row in self.rows()],
            "total_seconds": self.total_seconds,
            "verify": self.verified.to_dict(),
            "bench": {**self.benched, "bundle": str(Path(self.benched["bundle"]).name)},
            "engines": self.engines,
            "engines_not_built": self.no_engine_reason,
            "predictions": [self._prediction(p) for p in self.predictions],
        }

    def _prediction(self, prediction: Prediction) -> dict[str, Any]:
        shown = prediction.to_dict()
        files = {"mask": prediction.written.mask, "overlay": prediction.written.overlay}
        shown["image"] = prediction.image.name
        shown["files"] = {key: path.relative_to(self.folder).as_posix() for key, path in files.items()}
        return shown

    def _training_rows(self) -> Iterator[Row]:
        seconds, scores = self.trained.training_s, self.scores
        yield Row(
            "train", f"{self.trained.steps} steps on {self.trained.images} images", f"{seconds:.0f} s",
            f"≤ {TARGET_TRAINING_SECONDS:.0f} s", seconds <= TARGET_TRAINING_SECONDS,
        )  # fmt: skip
        found = scores.true.value is not None and scores.true.value >= TARGET_DICE
        lost = scores.drop.low is not None and scores.drop.low > MIN_DROP
        yield Row("evaluate", "Dice, true prompts", scores.true.show(), f"≥ {TARGET_DICE}", found)
        yield Row("evaluate", "Dice, shuffled prompts", scores.shuffled.show(), f"at least {MIN_DROP} less", lost)

    def _parity_rows(self) -> Iterator[Row]:
        for precision in dict.fromkeys(check.precision for check in self.verified.checks):
            for metric, name in (("relative_error", "largest relative error"), ("mask_dice", "worst mask Dice")):
                checks = [c for c in self.verified.checks if (c.precision, c.metric) == (precision, metric)]
                if not checks:
                    continue
                pick = min if metric == "mask_dice" else max
                worst = pick(check.value for check in checks)
                sign = "≥" if metric == "mask_dice" else "≤"
                passed = all(check.passed for check in checks)
                yield Row("verify", f"{precision}: {name}", f"{worst:.3g}", f"{sign} {checks[0].limit:g}", passed)

    def _engine_rows(self) -> Iterator[Row]:
        if self.no_engine_reason is not None:
            yield Row("build-engine", "TensorRT-RTX FP16", f"not built: {self.no_engine_reason}", "", None)
        for engine in self.engines:
            value = f"{engine['bytes'] / 1e6:.1f} MB, built in {engine['build_seconds']:.1f} s"
            yield Row("build-engine", f"{engine['graph']} {engine['precision']}, precision verified", value, "", None)

    def _latency_rows(self) -> Iterator[Row]:
        for result in self.benched["results"]:
            value = f"{result['p50_ms']:.1f} ms (p90 {result['p90_ms']:.1f})"
            yield Row("bench", f"{result['name']} ({result['stage']})", value, "", None)
        candidates = {result["name"]: result for result in self.benched["results"]}
        for form, ratio in product(RATIO_FORMS, self.benched["ratios"]):
            candidate, baseline = candidates[ratio["candidate"]], candidates[ratio["baseline"]]
            if (candidate["form"], candidate["precision"], baseline["role"]) == (form, "fp32", "baseline"):
                interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                value = f"{ratio['ratio']:.2f} ×{interval}"
                yield Row("bench", f"{candidate['name']} against {baseline['name']}", value, "", None)


def save_report(folder: Path, facts: DemoFacts, json_name: str, page_name: str) -> None:
    """Write the JSON file and the HTML page."""
    (folder / json_name).write_text(json_text(facts.to_dict()), encoding="utf-8")
    (folder / page_name).write_text(_page(facts), encoding="utf-8")


def _page(facts: DemoFacts) -> str:
    rows = tuple((r.stage, r.what, r.value, r.goal, "" if r.met is None else r.met) for r in facts.rows())
    figures = [Figure(p.written.overlay.relative_to(facts.folder).as_posix(), _caption(p)) for p in facts.predictions]
    real = [figure for figure in figures if figure.caption.startswith("RG1")]
    synthetic = [figure for figure in figures if figure not in real]
    cpu = facts.benched["fingerprint"].get("cpu", {})
    sections = [
        Section("Results", table=Table(("stage", "what", "value", "target", "met"), rows)),
        Section(
            "Synthetic test images",
            ("Each image has two to four lesions. The prompt names some of them, and only those should be segmented.",),
            figures=tuple(synthetic),
        ),
    ]
    if real:
        note = (
            "A chest radiograph of the package pydicom-data, read from DICOM. The network was trained for minutes on "
            "synthetic images, so this shows that DICOM input works, not that the masks are correct."
        )
        sections.append(Section("Real radiograph", (note,), figures=tuple(real)))
    sections.append(Section("Notes", facts.verified.notes))
    lead = (
        f"A tiny CausalCLIPSeg was trained, exported, built, verified, timed and run in {facts.total_seconds:.0f} s "
        f"on {cpu.get('model', 'this machine')}, without a GPU."
    )
    return write_page("cclip-deploy demo", lead, sections)


def _caption(prediction: Prediction) -> str:
    return f"{prediction.image.name}: “{prediction.prompt}” {prediction.area_share:.1%} of the image."
