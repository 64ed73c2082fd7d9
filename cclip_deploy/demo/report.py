"""What the demo found, as rows of one table, as JSON, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from cclip_deploy.common.html_page import Figure, Section, Table, write_page
from cclip_deploy.common.names import json_text, printable
from cclip_deploy.evaluation.evaluate import DiceScores
from cclip_deploy.inference.predict import Prediction
from cclip_deploy.train.run import TrainReport
from cclip_deploy.verify.verify import Verification

DICE_GOAL = 0.75
LEAST_DROP = 0.1
TRAINING_GOAL_SECONDS = 180.0
RATIO_CANDIDATES = ("fused fp32", "cached prompt fp32")
RATIO_BASELINES = ("pytorch eager", "pytorch eager, channels last", "plain export")
"""Ratios that the table shows; a new prompt, which the baselines encode too, comes first."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; `met` is None where there is no goal to meet."""

    stage: str
    what: str
    value: str
    goal: str
    met: bool | None


@dataclass(frozen=True)
class DemoFacts:
    """The results of every stage of one demo."""

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
        """The same with the time that all took."""
        return replace(self, total_seconds=total_seconds)

    def rows(self) -> list[Row]:
        """The table that the demo ends with."""
        return [*self._training_rows(), *self._parity_rows(), *self._engine_rows(), *self._latency_rows()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, paths relative to the demo's folder."""
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
            "train", f"{self.trained.steps} steps on {self.trained.images} films", f"{seconds:.0f} s",
            f"≤ {TRAINING_GOAL_SECONDS:.0f} s", seconds <= TRAINING_GOAL_SECONDS,
        )  # fmt: skip
        found = scores.true.value is not None and scores.true.value >= DICE_GOAL
        lost = scores.drop.low is not None and scores.drop.low > LEAST_DROP
        yield Row("evaluate", "Dice, true prompts", scores.true.show(), f"≥ {DICE_GOAL}", found)
        yield Row("evaluate", "Dice, shuffled prompts", scores.shuffled.show(), "clearly less", lost)

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
            yield Row("build-engine", f"{engine['graph']} {engine['precision']}, precision proved", value, "", None)

    def _latency_rows(self) -> Iterator[Row]:
        for result in self.benched["results"]:
            value = f"{result['p50_ms']:.1f} ms (p90 {result['p90_ms']:.1f})"
            yield Row("bench", f"{result['name']} ({result['stage']})", value, "", None)
        for candidate, ratio in product(RATIO_CANDIDATES, self.benched["ratios"]):
            if ratio["candidate"] == candidate and ratio["baseline"] in RATIO_BASELINES:
                interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                value = f"{ratio['ratio']:.2f} ×{interval}"
                yield Row("bench", f"{candidate} against {ratio['baseline']}", value, "", None)


def save_report(folder: Path, facts: DemoFacts, json_name: str, page_name: str) -> None:
    """Write the numbers and the page."""
    (folder / json_name).write_text(json_text(facts.to_dict()), encoding="utf-8")
    (folder / page_name).write_text(printable(_page(facts)), encoding="utf-8")


def _page(facts: DemoFacts) -> str:
    rows = tuple((r.stage, r.what, r.value, r.goal, "" if r.met is None else r.met) for r in facts.rows())
    figures = [Figure(p.written.overlay.relative_to(facts.folder).as_posix(), _caption(p)) for p in facts.predictions]
    real = [figure for figure in figures if figure.caption.startswith("RG1")]
    drawn = [figure for figure in figures if figure not in real]
    cpu = facts.benched["fingerprint"].get("cpu", {})
    sections = [
        Section("What came out", table=Table(("stage", "what", "value", "goal", "met"), rows)),
        Section(
            "Held-out synthetic films",
            ("Each film holds two to four lesions; the prompt names some of them, and only those may be marked.",),
            figures=tuple(drawn),
        ),
    ]
    if real:
        note = (
            "A chest radiograph of the package pydicom-data, read from DICOM. The network was trained on drawn films "
            "for minutes: this shows that the path from DICOM to mask works, not that the mask means anything."
        )
        sections.append(Section("A real film", (note,), figures=tuple(real)))
    sections.append(Section("Notes", facts.verified.notes))
    lead = (
        f"A tiny CausalCLIPSeg, trained, exported, built, verified, timed and run in {facts.total_seconds:.0f} s "
        f"on {cpu.get('model', 'this machine')}. No GPU was used; GPU latency is not measured."
    )
    return write_page("cclip-deploy demo", lead, sections)


def _caption(prediction: Prediction) -> str:
    return f"{prediction.image.name}: “{prediction.prompt}” {prediction.area_share:.1%} of the picture."
