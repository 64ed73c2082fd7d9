"""Bundle candidates: a bundle's graphs on a backend, as a whole, in parts, and on larger workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from cclip_deploy.benchmark.candidate import BenchCandidate, Floats, Form, Tokens
from cclip_deploy.benchmark.plan import (
    DECODE,
    IMAGE,
    PROMPT,
    WHOLE,
    BenchInputs,
    BenchOptions,
    LeftOut,
    workload_stage,
)
from cclip_deploy.bundle.bundle import CHAIN, Bundle
from cclip_deploy.bundle.manifest import graph_key
from cclip_deploy.errors import CclipError, UsageError
from cclip_deploy.inference.prompt_cache import PromptKernels
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.compare import can_chain
from cclip_deploy.runtime.backend import Arrays, Backend, DeviceTensor
from cclip_deploy.runtime.registry import BACKENDS, BackendConfig, OpenBackend, engine_precisions, opened
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend

HALF = ("fp16", "bf16")


def name_of(stage: str, precision: str, backend: str) -> str:
    """Return the name of a candidate; it contains the backend unless that is ONNX Runtime."""
    return f"{stage} {precision}" if backend == "onnxruntime" else f"{stage} {precision}, {BACKENDS[backend].label}"


def bundle_candidates(
    bundle: Bundle, inputs: BenchInputs, options: BenchOptions, left_out: LeftOut, stack: ExitStack
) -> list[BenchCandidate]:
    """Return candidates for every precision of the bundle on every requested backend.

    What a backend cannot run is added to `left_out`. The backends are open until `stack` is closed.

    Raises:
        BundleError: a graph was altered.
        CclipError: nothing can be timed; the first error is raised.
    """
    for entry in bundle.manifest.graphs.values():
        bundle.check(entry.file)
    found: list[BenchCandidate] = []
    problems: list[CclipError] = []
    for backend_name in options.backends():
        config = options.choice_of(backend_name)
        for precision in engine_precisions(bundle, backend_name) if config.runs_engines else bundle.precisions():
            reason = _reason_to_skip(bundle, precision, config, options)
            if reason is None:
                try:
                    open_backend = stack.enter_context(opened(config, bundle, precision))
                    segmenter = Segmenter.of_bundle(bundle, open_backend.backend)
                    found += _OnBackend(bundle, open_backend, segmenter, inputs, options).candidates()
                except CclipError as error:
                    problems.append(error)
                    reason = str(error)
            if reason is not None:
                what = "engines" if config.runs_engines else "graphs"
                left_out.append({"name": name_of(what, precision, backend_name), "reason": reason})
    if not found:
        raise (
            problems[0] if problems else UsageError(f"Nothing of {bundle.path} can be timed: {left_out[-1]['reason']}")
        )
    return found


def _reason_to_skip(bundle: Bundle, precision: str, config: BackendConfig, options: BenchOptions) -> str | None:
    """Return why a precision is not timed on a backend, checked before it is opened."""
    if precision == "bf16" and not config.on_gpu:
        return "no CPU kernel runs BF16; timings of the FP32 emulation are not representative"
    if not can_chain(bundle.manifest, precision):
        return f"the bundle lacks one of the three {precision} graphs"
    if options.peers and precision in HALF and not config.on_gpu:
        return "half precision is for GPUs, and the baselines run on the CPU"
    return None


@dataclass(frozen=True)
class _OnBackend:
    """The candidates of one backend in one precision."""

    bundle: Bundle
    opened: OpenBackend
    segmenter: Segmenter
    inputs: BenchInputs
    options: BenchOptions

    @property
    def backend(self) -> Backend:
        return self.opened.backend

    def candidates(self) -> list[BenchCandidate]:
        """Load every graph, so that errors occur before the timing, and return the candidates.

        Raises:
            CclipError: the backend cannot run a graph, or the bundle lacks an engine.
        """
        self._load()
        kernels = self.segmenter.run_prompt_encoder(self.inputs.tokens)
        one = kernels.part(0, 1)
        features = self.segmenter.run_image_encoder(self.inputs.image)
        cost = {name: self.bundle.graph(name).multiply_adds for name in CHAIN}
        image_cost, prompt_cost, decoder_cost = (cost[name] for name in CHAIN)
        found = [
            self._with_prompt(sum(cost.values())),
            self._named(
                Form.CACHED, WHOLE, lambda: self._image_and_kernels(self.inputs.image, one),
                includes_prompt_encoding=False, multiply_adds=image_cost + decoder_cost, answer=self._chain,
            ),
            self._named(
                Form.PROMPT, PROMPT, lambda: self.backend.run("prompt_encoder", {"tokens": self.inputs.prompt}),
                includes_prompt_encoding=True, multiply_adds=prompt_cost,
            ),
            self._named(
                Form.MORE, DECODE, lambda: self.segmenter.run_mask_decoder(features, one),
                includes_prompt_encoding=False, multiply_adds=decoder_cost,
            ),
        ]  # fmt: skip
        if self.options.peers:
            found.append(self._named(Form.IMAGE, IMAGE, self._image_pass, multiply_adds=image_cost))
            found += list(self._workloads(kernels, cost))
        return found

    def _with_prompt(self, chain_cost: int) -> BenchCandidate:
        """One image and one new prompt: the fused graph, else the three graphs in sequence."""
        form, answer = (Form.FUSED, self._fused) if self._has_fused() else (Form.NEW, self._chain)
        operations = self.bundle.graph("fused").multiply_adds if self._has_fused() else chain_cost
        return self._named(
            form, WHOLE, lambda: answer(self.inputs.image, self.inputs.prompt),
            includes_prompt_encoding=True, multiply_adds=operations, answer=answer,
        )  # fmt: skip

    def _load(self) -> None:
        for graph in (*CHAIN, *["fused"] * self._has_fused()):
            self.backend.load(graph)

    def _named(
        self, form: Form, stage: str, run: Callable[[], object], name: str = "", **fields: Any
    ) -> BenchCandidate:
        extra: dict[str, object] = {"threads": self.options.threads, "ran": self.opened.ran}
        if self.opened.arithmetic is not None:
            extra["arithmetic"] = self.opened.arithmetic
        if self.opened.fallback_reason is not None:
            extra |= {"asked": self.opened.requested, "fallback_reason": self.opened.fallback_reason}
        backend, precision = self.backend.name, self.backend.precision
        return BenchCandidate(
            name_of(name or form, precision, backend), backend, precision, stage, run, extra,
            role="bundle", form=form, device=self.opened.device, **fields,
        )  # fmt: skip

    def _workloads(self, kernels: PromptKernels, cost: Mapping[str, int]) -> Iterator[BenchCandidate]:
        """Yield every workload twice: with the prompts encoded in the timed region, and cached."""
        image_cost, prompt_cost, decoder_cost = (cost[name] for name in CHAIN)

        def answer(pictures: int, of_prompts: PromptKernels) -> list[Floats]:
            images = (self.inputs.images[n : n + 1] for n in range(pictures))
            return [self.segmenter.decode(self.segmenter.run_image_encoder(image), of_prompts) for image in images]

        for pictures, prompts in self.options.workloads:
            stage = workload_stage(pictures, prompts)
            with_prompt_encoding = partial(self.segmenter.run_prompt_encoder, self.inputs.tokens[:prompts])
            cached = partial(kernels.part, 0, prompts)
            for form, get_kernels in ((Form.NEW_PROMPTS, with_prompt_encoding), (Form.CACHED_PROMPTS, cached)):
                is_new = form is Form.NEW_PROMPTS

                def run(pictures: int = pictures, get: Callable[[], PromptKernels] = get_kernels) -> list[Floats]:
                    return answer(pictures, get())

                operations = pictures * (image_cost + prompts * decoder_cost) + is_new * prompts * prompt_cost
                yield self._named(
                    form, stage, run, f"{stage}, {form}", workload=(pictures, prompts),
                    includes_prompt_encoding=is_new, multiply_adds=operations,
                )  # fmt: skip

    def _has_fused(self) -> bool:
        if isinstance(self.backend, TensorRtBackend):
            return "fused" in self.backend.graphs
        return graph_key("fused", self.backend.precision) in self.bundle.manifest.graphs

    def _image_pass(self) -> None:
        """Compute the features and wait for the device."""
        features = self.segmenter.run_image_encoder(self.inputs.image)
        if isinstance(features, DeviceTensor):
            features.wait()

    def _image_and_kernels(self, image: Floats, kernels: PromptKernels) -> Floats:
        return self.segmenter.run_mask_decoder(self.segmenter.run_image_encoder(image), kernels)

    def _chain(self, image: Floats, tokens: Tokens) -> Floats:
        return self._image_and_kernels(image, self.segmenter.run_prompt_encoder(tokens))

    def _fused(self, image: Floats, tokens: Tokens) -> Floats:
        pair: Arrays = {"image": image, "tokens": tokens}
        return self.backend.run("fused", pair)["logits"]
