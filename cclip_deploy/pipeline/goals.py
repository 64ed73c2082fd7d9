"""The figures that the project is held to, computed from one benchmark run, each beside its goal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.evidence.latency import Candidate, Timing
from cclip_deploy.evidence.latency_statistics import PairedRatio, paired_ratio
from cclip_deploy.evidence.process import ProcessCost
from cclip_deploy.manifest import Manifest
from cclip_deploy.pipeline.bench_ours import LABELS, name_of
from cclip_deploy.pipeline.bench_plan import WHOLE, workload_stage
from cclip_deploy.pipeline.peers import EAGER, PLAIN, PRODUCT_MULTIPLY_ADDS, SGEMM

Samples = NDArray[np.float64]
Unit = Literal["×", "%", "", "B", "s", "ms"]

GOAL_NETWORK, GOAL_HW = "rn101", (224, 224)
PEAK_MULTIPLY_ADDS = 21.3e9
"""What the goal for the share of the peak counts for the image pass at 224×224, whatever the graph really does."""


@dataclass(frozen=True)
class Figure:
    """One figure; `goal` and `met` are None where this network or size has none. Shares are in percent.

    `extrapolated` says how, where a baseline was not run as often as the figure says.
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

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {**asdict(self), "met": self.met}


def figures(
    manifest: Manifest,
    candidates: Sequence[Candidate],
    timings: Mapping[str, Timing],
    processes: Mapping[str, ProcessCost],
    seed: int,
) -> list[Figure]:
    """All that the run can say; ratios are paired round by round, with 95 % intervals."""
    return list(_Figures(manifest, candidates, timings, seed).all(processes))


@dataclass(frozen=True)
class _Figures:
    manifest: Manifest
    candidates: Sequence[Candidate]
    timings: Mapping[str, Timing]
    seed: int

    def all(self, processes: Mapping[str, ProcessCost]) -> Iterator[Figure]:
        graphs, at_224 = self.manifest.graphs, self._is_goal_size()
        counted = sum(graphs[name].multiply_adds for name in ("image_encoder", "prompt_encoder", "mask_decoder"))
        yield Figure(
            "multiply-adds, one image and one prompt", None, counted, "", goal=22e9 if at_224 else None, at_least=False
        )
        for backend in LABELS:
            cached, image = (self._ms(name_of(stage, "fp32", backend)) for stage in ("cached prompt", "image pass"))
            if cached is not None and image is not None:
                yield from self._against_peers(backend, cached)
                yield from self._more_prompts(backend, image)
                yield from self._share_of_peak(backend, image)
        for backend, cost in processes.items():
            memory, start = (1.2e9, 3.0) if at_224 else (None, None)
            yield Figure("peak memory of predict", backend, cost.peak_bytes, "B", goal=memory, at_least=False)
            yield Figure("predict, start to end, warm disk", backend, cost.seconds, "s", goal=start, at_least=False)

    def _against_peers(self, backend: str, cached: Samples) -> Iterator[Figure]:
        what = "image pass and cached prompt against"
        plain, eager = self._ms(PLAIN), self._ms(EAGER)
        if plain is not None:
            yield self._times(f"{what} the plain export in ONNX Runtime", backend, plain, cached, 4.0)
        if eager is not None:
            yield self._times(f"{what} PyTorch eager, whole network", backend, eager, cached, 10.5)
        peers = [c.name for c in self.candidates if c.stage == WHOLE and not c.extra.get("ours")]
        if peers:
            fastest = min(peers, key=lambda name: float(np.median(self.timings[name].samples_ms)))
            yield self._times(
                f"{what} the fastest peer ({fastest})", backend, self.timings[fastest].samples_ms, cached, 3.8
            )

    def _more_prompts(self, backend: str, image: Samples) -> Iterator[Figure]:
        more, plain = self._ms(name_of("one more prompt", "fp32", backend)), self._ms(PLAIN)
        if more is not None:
            yield self._percent("one more prompt, share of the image pass", backend, more, image, 2.0, at_least=False)
        for pictures, prompts in self._workloads():
            many = self._ms(name_of(workload_stage(pictures, prompts), "fp32", backend))
            if many is None:
                continue
            count = pictures * prompts
            images = "one image" if pictures == 1 else f"each of {pictures} images"
            what = f"{prompts} prompt{'s' * (prompts > 1)} on {images}"
            yield Figure(f"{what}, time per prompt and image", backend, float(np.median(many)) / count, "ms")
            if plain is not None:
                goal = 100.0 if (pictures, prompts) == (1, 128) else None
                told = f"{count} × one run of the same round"
                yield self._times(f"{what} against the plain export", backend, plain * count, many, goal, told)

    def _share_of_peak(self, backend: str, image: Samples) -> Iterator[Figure]:
        product = self._ms(SGEMM)
        if product is None:
            return
        counted = self.manifest.graphs["image_encoder"].multiply_adds
        ideal_ms = product / PRODUCT_MULTIPLY_ADDS
        if self._is_goal_size():
            what = f"sgemm peak's time for {PEAK_MULTIPLY_ADDS / 1e9:.1f} G multiply-adds, share of the image pass"
            yield self._percent(what, backend, ideal_ms * PEAK_MULTIPLY_ADDS, image, 92.0)
        what = "share of the sgemm peak that the image pass's counted multiply-adds reach"
        yield self._percent(what, backend, ideal_ms * counted, image, None)

    def _workloads(self) -> list[tuple[int, int]]:
        found = (candidate.extra.get("workload") for candidate in self.candidates)
        return [pair for pair in dict.fromkeys(found) if isinstance(pair, tuple)]

    def _ms(self, name: str) -> Samples | None:
        return self.timings[name].samples_ms if name in self.timings else None

    def _times(
        self, what: str, backend: str, slow: Samples, fast: Samples, goal: float | None, extrapolated: str | None = None
    ) -> Figure:
        ratio = paired_ratio(slow, fast, self.seed)
        goal = goal if self.manifest.model["name"] == GOAL_NETWORK else None
        return _figure(what, backend, ratio, 1.0, "×", goal, True, extrapolated)

    def _percent(
        self, what: str, backend: str, part: Samples, whole: Samples, goal: float | None, at_least: bool = True
    ) -> Figure:
        ratio = paired_ratio(part, whole, self.seed)
        goal = goal if self.manifest.model["name"] == GOAL_NETWORK else None
        return _figure(what, backend, ratio, 100.0, "%", goal, at_least, None)

    def _is_goal_size(self) -> bool:
        return self.manifest.model["name"] == GOAL_NETWORK and self.manifest.image_hw == GOAL_HW


def _figure(
    what: str, backend: str, ratio: PairedRatio, scale: float, unit: Unit, goal: float | None, at_least: bool,
    extrapolated: str | None,
) -> Figure:  # fmt: skip
    low, high = (None if end is None else scale * end for end in (ratio.low, ratio.high))
    return Figure(what, backend, scale * ratio.ratio, unit, low, high, goal, at_least, extrapolated)
