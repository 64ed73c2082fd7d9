"""Figures of a benchmark run and their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.benchmark.candidate import BenchCandidate, Form, Setting
from cclip_deploy.benchmark.latency import Timing
from cclip_deploy.benchmark.plan import WHOLE
from cclip_deploy.benchmark.process import ProcessCost
from cclip_deploy.benchmark.statistics import paired_ratio
from cclip_deploy.bundle.manifest import Manifest

Samples = NDArray[np.float64]
Unit = Literal["×", "%", "", "B", "s", "ms"]

TARGET_NETWORK, TARGET_HW = "rn101", (224, 224)
PEAK_MULTIPLY_ADDS = 21.3e9
"""Multiply-adds of the image pass at 224×224 by which the target fraction of the peak is defined."""
SPEED_UP_TARGETS = {"plain": 4.0, "eager": 10.5, "fastest": 3.8}
"""Target speed-up of one image and one cached prompt over each baseline."""


@dataclass(frozen=True)
class Subject:
    """Subject of a figure; fields that do not apply are None.

    `workload` is (images, prompts for each image). `compared_with` is plain, eager, eager causal, fastest (in FP32) or
    defaults (of OpenVINO); `baseline` is its name, `baseline_precision` the precision of its products.
    """

    form: str | None = None
    precision: str | None = None
    includes_prompt_encoding: bool | None = None
    workload: tuple[int, int] | None = None
    compared_with: str | None = None
    baseline: str | None = None
    baseline_precision: str | None = None


@dataclass(frozen=True)
class Figure:
    """One figure; `goal` and `met` are None without a target for this network and size.

    `low` and `high` are None if the rounds are too few for an interval, `n` is the number of paired rounds.
    `extrapolated` describes how the time of the baseline was extrapolated, if it was.
    """

    what: str
    backend: str | None
    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    at_least: bool = True
    extrapolated: str | None = None
    n: int | None = None
    subject: Subject = Subject()

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the fields of the subject."""
        facts = asdict(self)
        return {**facts, **facts.pop("subject"), "met": self.met}


def figures(
    manifest: Manifest,
    candidates: Sequence[BenchCandidate],
    timings: Mapping[str, Timing],
    processes: Mapping[str, ProcessCost],
) -> list[Figure]:
    """Return all figures of a run, by backend and precision."""
    return list(_Figures(manifest, candidates, timings).all(processes))


def ratio_baselines(candidates: Sequence[BenchCandidate]) -> list[str]:
    """Return the names of the baselines of `ratios`."""
    chosen = [
        c.name
        for c in candidates
        if c.role == "baseline"
        and (
            c.form is Form.EAGER
            or (c.form is Form.PLAIN and c.backend == "onnxruntime")
            or c.setting is Setting.OPENVINO_DEFAULTS
        )
    ]
    return chosen or [c.name for c in candidates if c.role == "bundle" and c.stage == WHOLE][:1]


@dataclass(frozen=True)
class _Baseline:
    """A baseline of figures, with its kind and its description."""

    kind: Literal["plain", "eager", "eager causal", "fastest", "defaults"]
    candidate: BenchCandidate
    words: str


@dataclass(frozen=True)
class _Figures:
    manifest: Manifest
    candidates: Sequence[BenchCandidate]
    timings: Mapping[str, Timing]

    def all(self, processes: Mapping[str, ProcessCost]) -> Iterator[Figure]:
        yield from self._operations()
        of_bundle = [c for c in self.candidates if c.role == "bundle"]
        for backend, precision in dict.fromkeys((c.backend, c.precision) for c in of_bundle):
            group = [c for c in of_bundle if (c.backend, c.precision) == (backend, precision)]
            yield from self._of_one_pair(group)
            yield from self._of_many_pairs(group)
            yield from self._of_peak(group)
        plain = self._plain()
        if plain is not None and plain.multiply_adds:
            yield from self._at_peak("the plain export", plain, plain.multiply_adds, None)
        for backend, cost in processes.items():
            memory, start = (1.2e9, 3.0) if self._has_targets() else (None, None)
            yield Figure("peak memory of predict", backend, cost.peak_bytes, "B", goal=memory, at_least=False)
            yield Figure("predict, start to end, warm disk", backend, cost.seconds, "s", goal=start, at_least=False)

    def _operations(self) -> Iterator[Figure]:
        image, prompt, decoder = (
            self.manifest.graphs[name].multiply_adds for name in ("image_encoder", "prompt_encoder", "mask_decoder")
        )
        goal = 22e9 if self._has_targets() else None
        pairs = (("new prompt", image + prompt + decoder, goal), ("cached prompt", image + decoder, None))
        for words, count, at_most in pairs:
            what = f"multiply-adds, one image and one {words}"
            yield Figure(what, None, count, "", goal=at_most, at_least=False)
        plain = self._plain()
        if plain is not None and plain.multiply_adds:
            yield Figure("multiply-adds of the plain export", None, plain.multiply_adds, "")
            for words, count, _ in pairs:
                what = f"multiply-adds of the plain export, against one image and one {words}"
                yield Figure(what, None, plain.multiply_adds / count, "×")

    def _of_one_pair(self, group: Sequence[BenchCandidate]) -> Iterator[Figure]:
        for candidate in _of_forms(group, Form.FUSED, Form.NEW, Form.CACHED):
            words = "cached prompt" if candidate.form is Form.CACHED else "new prompt"
            for baseline in self._baselines(candidate.device):
                figure = self._speed_up(f"one image and one {words}", candidate, baseline)
                has_target = candidate.form is Form.CACHED and candidate.precision == "fp32"
                yield replace(figure, goal=self._target(SPEED_UP_TARGETS.get(baseline.kind)) if has_target else None)
        for image in _of_forms(group, Form.IMAGE):
            for more in _of_forms(group, Form.MORE):
                figure = self._percent("one more prompt, of the image pass", more, self._ms(more), self._ms(image))
                goal = self._target(2.0) if more.precision == "fp32" else None
                yield replace(figure, goal=goal, at_least=False)

    def _of_many_pairs(self, group: Sequence[BenchCandidate]) -> Iterator[Figure]:
        for candidate in _of_forms(group, Form.NEW_PROMPTS, Form.CACHED_PROMPTS):
            (images, prompts), samples = candidate.workload, self._ms(candidate)
            count = images * prompts
            words = ("new prompt" if candidate.form is Form.NEW_PROMPTS else "cached prompt") + "s" * (prompts > 1)
            what = f"{prompts} {words} on {'one image' if images == 1 else f'each of {images} images'}"
            value, about = float(np.median(samples)) / count, _subject(candidate)
            yield Figure(
                f"{what}, time per prompt and image", candidate.backend, value, "ms", n=samples.size, subject=about
            )
            for baseline in self._baselines(candidate.device):
                if baseline.kind in ("plain", "eager", "defaults"):
                    figure = self._speed_up(what, candidate, baseline, count)
                    has_target = (candidate.form, candidate.workload, candidate.precision) == (
                        Form.CACHED_PROMPTS,
                        (1, 128),
                        "fp32",
                    )
                    yield replace(figure, goal=self._target(100.0) if has_target and baseline.kind == "plain" else None)

    def _of_peak(self, group: Sequence[BenchCandidate]) -> Iterator[Figure]:
        for image in _of_forms(group, Form.IMAGE):
            if image.precision != "fp32" or not image.multiply_adds:
                continue
            if self._has_targets():
                words = f"{PEAK_MULTIPLY_ADDS / 1e9:.1f} G multiply-adds in the time of the image pass"
                yield from self._at_peak(words, image, PEAK_MULTIPLY_ADDS, 92.0)
            yield from self._at_peak("the image pass", image, image.multiply_adds, None)

    def _at_peak(self, words: str, of: BenchCandidate, multiply_adds: float, goal: float | None) -> Iterator[Figure]:
        """Yield the throughput relative to the large matrix product, if that ran on the same device."""
        for product in self.candidates:
            if product.role == "machine" and product.device == of.device and product.multiply_adds:
                ideal_ms = self._ms(product) / product.multiply_adds * multiply_adds
                figure = self._percent(f"of the sgemm peak: {words}", of, ideal_ms, self._ms(of))
                yield replace(figure, goal=self._target(goal))

    def _baselines(self, device: str) -> Iterator[_Baseline]:
        """Yield the baselines on a device, each in its faster setting."""
        there = [c for c in self.candidates if c.role == "baseline" and c.device == device]
        plain = self._plain()
        if plain is not None and plain.device == device:
            yield _Baseline("plain", plain, "the plain export in ONNX Runtime")
        if eager := self._fastest([c for c in there if c.form is Form.EAGER]):
            yield _Baseline("eager", eager, f"PyTorch eager, whole network{_setting(eager)}")
        if eager := self._fastest([c for c in there if c.form is Form.EAGER_CAUSAL]):
            yield _Baseline("eager causal", eager, f"PyTorch eager, causal path{_setting(eager)}")
        if fastest := self._fastest([c for c in there if c.precision_class == "fp32"]):
            yield _Baseline("fastest", fastest, f"the fastest FP32 baseline ({fastest.name})")
        if defaults := self._fastest([c for c in there if c.setting is Setting.OPENVINO_DEFAULTS]):
            name = f"{defaults.form} in {defaults.precision.upper()}"
            yield _Baseline("defaults", defaults, f"OpenVINO with its defaults ({name})")

    def _fastest(self, candidates: Sequence[BenchCandidate]) -> BenchCandidate | None:
        return min(candidates, key=lambda c: float(np.median(self._ms(c))), default=None)

    def _plain(self) -> BenchCandidate | None:
        plain = (c for c in self.candidates if c.form is Form.PLAIN and c.backend == "onnxruntime")
        return next(plain, None)

    def _ms(self, candidate: BenchCandidate) -> Samples:
        return self.timings[candidate.name].samples_ms

    def _speed_up(self, what: str, candidate: BenchCandidate, baseline: _Baseline, count: int = 1) -> Figure:
        ratio = paired_ratio(self._ms(baseline.candidate) * count, self._ms(candidate))
        return Figure(
            f"{what}, against {baseline.words}", candidate.backend, ratio.ratio, "×", ratio.low, ratio.high, n=ratio.n,
            extrapolated=f"{count} × one run of the same round" if count > 1 else None,
            subject=_subject(candidate, baseline),
        )  # fmt: skip

    def _percent(self, what: str, of: BenchCandidate, part: Samples, whole: Samples) -> Figure:
        ratio = paired_ratio(part, whole)
        low, high = (None if bound is None else 100 * bound for bound in (ratio.low, ratio.high))
        return Figure(what, of.backend, 100 * ratio.ratio, "%", low, high, n=ratio.n, subject=_subject(of))

    def _target(self, goal: float | None) -> float | None:
        return goal if self.manifest.model["name"] == TARGET_NETWORK else None

    def _has_targets(self) -> bool:
        return self.manifest.model["name"] == TARGET_NETWORK and self.manifest.image_hw == TARGET_HW


def _of_forms(group: Sequence[BenchCandidate], *forms: Form) -> Iterator[BenchCandidate]:
    """Return the candidates of these forms, ordered by form."""
    return (candidate for form in forms for candidate in group if candidate.form is form)


def _setting(candidate: BenchCandidate) -> str:
    return "" if candidate.setting is None else f", {candidate.setting}"


def _subject(candidate: BenchCandidate, baseline: _Baseline | None = None) -> Subject:
    facts = Subject(str(candidate.form), candidate.precision, candidate.includes_prompt_encoding, candidate.workload)
    if baseline is None:
        return facts
    of = baseline.candidate
    return replace(facts, compared_with=baseline.kind, baseline=of.name, baseline_precision=of.precision)
