"""Our own candidates: a bundle's graphs on a backend, whole, in parts, and many prompts or pictures at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import EnvironmentProblem
from cclip_deploy.evidence.latency import Candidate
from cclip_deploy.evidence.parity import CHAIN, can_chain
from cclip_deploy.manifest import graph_key
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
from cclip_deploy.runtime.backend import Arrays, Backend, KeepsOutputs, Kept, KeptOrArrays
from cclip_deploy.runtime.choice import Opened, engine_precisions, opened
from cclip_deploy.runtime.tensorrt_runner import TensorRtBackend
from cclip_deploy.segmenter import PROMPTS_AT_ONCE, Features, Segmenter

LABELS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
HALF = ("fp16", "bf16")


def name_of(stage: str, precision: str, backend: str) -> str:
    """A candidate's name; ONNX Runtime, the default, goes without saying."""
    return f"{stage} {precision}" if backend == "onnxruntime" else f"{stage} {precision}, {LABELS[backend]}"


def our_candidates(
    bundle: Bundle, inputs: BenchInputs, options: BenchOptions, left_out: LeftOut, stack: ExitStack
) -> list[Candidate]:
    """Every precision of the bundle on every backend asked for; what is missing goes to `left_out`.

    The backends are open until `stack` is closed.
    """
    found: list[Candidate] = []
    for backend_name in options.backends():
        choice = options.choice_of(backend_name)
        for precision in engine_precisions(bundle, backend_name) if choice.runs_engines else bundle.precisions():
            if precision == "bf16" and not choice.on_gpu:
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
                    ours = stack.enter_context(opened(choice, bundle, precision))
                except EnvironmentProblem as error:
                    if not options.peers:
                        raise
                    left_out.append({"name": name_of("graphs", precision, backend_name), "reason": str(error)})
                    continue
                missing = _missing_engines(ours.backend)
                if missing:
                    reason = f"the bundle has no engine of {', '.join(missing)}"
                    left_out.append({"name": name_of("engines", precision, backend_name), "reason": reason})
                else:
                    found += _OnBackend(bundle, ours, inputs, options).candidates()
    return found


def _missing_engines(backend: Backend) -> list[str]:
    return [g for g in CHAIN if g not in backend.graphs] if isinstance(backend, TensorRtBackend) else []


@dataclass(frozen=True)
class _OnBackend:
    """The candidates of one backend in one precision; the prompts' kernels and one picture's features are kept."""

    bundle: Bundle
    ours: Opened
    inputs: BenchInputs
    options: BenchOptions

    @property
    def backend(self) -> Backend:
        return self.ours.backend

    def candidates(self) -> list[Candidate]:
        kernels = self._encode_prompts()
        one = kernels.part(0, 1)
        features = self._features(self.inputs.image)
        found = [
            self._named("cached prompt", WHOLE, lambda: self._decode(self._features(self.inputs.image), one)),
            self._named("prompt", PROMPT, lambda: self.backend.run("prompt_encoder", {"tokens": self.inputs.prompt})),
            self._named("one more prompt", DECODE, lambda: self._decode(features, one)),
        ]
        if self._has_fused():
            found.insert(0, self._named("fused", WHOLE, self._fused))
        if self.options.peers:
            found.append(self._named("image pass", IMAGE, self._image_pass))
            found += list(self._workloads(kernels))
        return found

    def _named(self, name: str, stage: str, run: Callable[[], object], **facts: object) -> Candidate:
        full_name = name_of(name, self.backend.precision, self.backend.name)
        extra = {**self.options.extra(), "ours": True, "ran": self.ours.ran, **facts}
        if self.ours.why is not None:
            extra |= {"asked": self.ours.asked, "fallback_reason": self.ours.why}
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

    def _has_fused(self) -> bool:
        if isinstance(self.backend, TensorRtBackend):
            return "fused" in self.backend.graphs
        return graph_key("fused", self.backend.precision) in self.bundle.manifest.graphs

    def _image_pass(self) -> None:
        """Until the features are there, wherever they are."""
        features = self._features(self.inputs.image)
        if isinstance(features, Kept):
            features.wait()

    def _features(self, image: Floats) -> Features:
        if isinstance(self.backend, KeepsOutputs):
            return self.backend.run_kept("image_encoder", {"image": image}, ["features"])["features"]
        return self.backend.run("image_encoder", {"image": image})["features"]

    def _decode(self, features: Features, kernels: PromptKernels) -> Floats:
        prompt = {"kernel": kernels.kernel, "tap_bias": kernels.tap_bias, "bias": kernels.bias}
        if isinstance(self.backend, KeepsOutputs):
            inputs: KeptOrArrays = {"features": features, **prompt}
            return self.backend.run("mask_decoder", inputs)["logits"]
        return self.backend.run("mask_decoder", {"features": np.asarray(features), **prompt})["logits"]

    def _fused(self) -> Floats:
        pair: Arrays = {"image": self.inputs.image, "tokens": self.inputs.prompt}
        return self.backend.run("fused", pair)["logits"]
