"""Our own candidates: a bundle's graphs on a backend, whole, in parts, and many prompts or pictures at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cclip_deploy.bundle import Bundle, graph_key
from cclip_deploy.errors import EnvironmentProblem
from cclip_deploy.evidence.latency import Candidate
from cclip_deploy.evidence.parity import can_chain
from cclip_deploy.pipeline.bench_plan import (
    DECODE,
    IMAGE,
    PROMPT,
    WHOLE,
    BenchInputs,
    BenchOptions,
    Floats,
    LeftOut,
    workload_stage,
)
from cclip_deploy.prompt_cache import PromptKernels
from cclip_deploy.runtime.backend import Arrays, Backend
from cclip_deploy.runtime.choice import open_backend
from cclip_deploy.segmenter import PROMPTS_AT_ONCE, Segmenter

LABELS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
HALF = ("fp16", "bf16")


def name_of(stage: str, precision: str, backend: str) -> str:
    """A candidate's name; ONNX Runtime, the default, goes without saying."""
    return f"{stage} {precision}" if backend == "onnxruntime" else f"{stage} {precision}, {LABELS[backend]}"


def our_candidates(bundle: Bundle, inputs: BenchInputs, options: BenchOptions, left_out: LeftOut) -> list[Candidate]:
    """Every precision of the bundle on every backend asked for; what is missing goes to `left_out`."""
    found: list[Candidate] = []
    for backend_name in options.backends():
        for precision in bundle.precisions():
            if precision == "bf16" and options.device == "cpu":
                reason = "no CPU kernel runs BF16; its widened form is no timing"
                left_out.append({"name": name_of("graphs", precision, backend_name), "reason": reason})
            elif not can_chain(bundle.manifest, precision):
                reason = f"the bundle has no {precision} graphs of all three parts"
                left_out.append({"name": name_of("graphs", precision, backend_name), "reason": reason})
            elif options.peers and precision in HALF:
                reason = "half precision is for GPUs; the peers run in FP32"
                left_out.append({"name": name_of("graphs", precision, backend_name), "reason": reason})
            else:
                try:
                    backend = open_backend(backend_name, bundle, precision, options.device, options.threads)
                except EnvironmentProblem as error:
                    if not options.peers:
                        raise
                    left_out.append({"name": name_of("graphs", precision, backend_name), "reason": str(error)})
                    continue
                found += _OnBackend(bundle, backend, inputs, options).candidates()
    return found


@dataclass(frozen=True)
class _OnBackend:
    """The candidates of one backend in one precision; the prompts' kernels and one picture's features are kept."""

    bundle: Bundle
    backend: Backend
    inputs: BenchInputs
    options: BenchOptions

    def candidates(self) -> list[Candidate]:
        kernels = self._encode_prompts()
        one = kernels.part(0, 1)
        features = self._features(self.inputs.image)
        found = [
            self._named("cached prompt", WHOLE, lambda: self._decode(self._features(self.inputs.image), one)),
            self._named("prompt", PROMPT, lambda: self.backend.run("prompt_encoder", {"tokens": self.inputs.prompt})),
            self._named("one more prompt", DECODE, lambda: self._decode(features, one)),
        ]
        if graph_key("fused", self.backend.precision) in self.bundle.manifest.graphs:
            found.insert(0, self._named("fused", WHOLE, self._fused))
        if self.options.peers:
            found.append(self._named("image pass", IMAGE, lambda: self._features(self.inputs.image)))
            found += list(self._workloads(kernels))
        return found

    def _named(self, name: str, stage: str, run: Callable[[], object], **facts: object) -> Candidate:
        full_name = name_of(name, self.backend.precision, self.backend.name)
        extra = {**self.options.extra(), "ours": True, **facts}
        return Candidate(full_name, self.backend.name, self.backend.precision, stage, run, extra)

    def _workloads(self, kernels: PromptKernels) -> Iterator[Candidate]:
        segmenter = Segmenter(self.bundle, self.backend)
        for pictures, prompts in self.options.workloads:

            def run(pictures: int = pictures, prompts: int = prompts) -> list[Floats]:
                images = (self.inputs.images[n : n + 1] for n in range(pictures))
                return [segmenter.decode(self._features(image), kernels.part(0, prompts)) for image in images]

            stage = workload_stage(pictures, prompts)
            yield self._named(stage, stage, run, workload=(pictures, prompts))

    def _encode_prompts(self) -> PromptKernels:
        tokens = self.inputs.tokens
        parts = [tokens[start : start + PROMPTS_AT_ONCE] for start in range(0, len(tokens), PROMPTS_AT_ONCE)]
        answers = [self.backend.run("prompt_encoder", {"tokens": part}) for part in parts]
        names = ("kernel", "tap_bias", "bias")
        return PromptKernels(**{name: np.concatenate([answer[name] for answer in answers]) for name in names})

    def _features(self, image: Floats) -> Floats:
        return self.backend.run("image_encoder", {"image": image})["features"]

    def _decode(self, features: Floats, kernels: PromptKernels) -> Floats:
        prompt = {"kernel": kernels.kernel, "tap_bias": kernels.tap_bias, "bias": kernels.bias}
        return self.backend.run("mask_decoder", {"features": features, **prompt})["logits"]

    def _fused(self) -> Floats:
        pair: Arrays = {"image": self.inputs.image, "tokens": self.inputs.prompt}
        return self.backend.run("fused", pair)["logits"]
