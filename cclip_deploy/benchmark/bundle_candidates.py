"""Bundle candidates: a bundle's graphs on a backend, whole, in parts, and many prompts or images at once."""

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
    """A candidate's name; ONNX Runtime, the default, is not named."""
    return f"{stage} {precision}" if backend == "onnxruntime" else f"{stage} {precision}, {BACKENDS[backend].label}"


def bundle_candidates(
    bundle: Bundle, inputs: BenchInputs, options: BenchOptions, left_out: LeftOut, stack: ExitStack
) -> list[BenchCandidate]:
    """Every precision of the bundle on every requested backend; what a backend cannot run goes to `left_out`.

    The backends are open until `stack` is closed.

    Raises:
        BundleError: a graph was altered.
        CclipError: nothing can be measured; the error is that of the first precision.
    """
    for entry in bundle.manifest.graphs.values():
        bundle.check(entry.file)
    found: list[BenchCandidate] = []
    problems: list[CclipError] = []
    for backend_name in options.backends():
        choice = options.choice_of(backend_name)
        for precision in engine_precisions(bundle, backend_name) if choice.runs_engines else bundle.precisions():
            reason = _why_not(bundle, precision, choice, options)
            if reason is None:
                try:
                    ours = stack.enter_context(opened(choice, bundle, precision))
                    found += _OnBackend(
                        bundle, ours, Segmenter.of_bundle(bundle, ours.backend), inputs, options, _device(ours, choice)
                    ).candidates()
                except CclipError as error:
                    problems.append(error)
                    reason = str(error)
            if reason is not None:
                what = "engines" if choice.runs_engines else "graphs"
                left_out.append({"name": name_of(what, precision, backend_name), "reason": reason})
    if not found:
        raise (
            problems[0] if problems else UsageError(f"Nothing of {bundle.path} can be timed: {left_out[-1]['reason']}")
        )
    return found


def _why_not(bundle: Bundle, precision: str, choice: BackendConfig, options: BenchOptions) -> str | None:
    """Why a precision is not timed on a backend, before it is opened."""
    if precision == "bf16" and not choice.on_gpu:
        return "no CPU kernel runs BF16; its widened form is no timing"
    if not can_chain(bundle.manifest, precision):
        return f"the bundle has no {precision} graphs of all three parts"
    if options.peers and precision in HALF and not choice.on_gpu:
        return "half precision is for GPUs; the baselines run on the CPU"
    return None


def _device(ours: OpenBackend, choice: BackendConfig) -> str:
    """Where a backend really runs; engines run on a CUDA device."""
    if ours.fallback_reason is not None:
        return "cpu"
    return "cuda" if choice.runs_engines else choice.device


@dataclass(frozen=True)
class _OnBackend:
    """The candidates of one backend in one precision; the prompts' kernels and one image's features are kept."""

    bundle: Bundle
    ours: OpenBackend
    segmenter: Segmenter
    inputs: BenchInputs
    options: BenchOptions
    device: str

    @property
    def backend(self) -> Backend:
        return self.ours.backend

    def candidates(self) -> list[BenchCandidate]:
        """Load every graph, so that one which the backend cannot run fails here and not while others are timed.

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
        """One image and one new prompt: the fused graph or, where a precision has none, the three graphs in a row."""
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
        extra: dict[str, object] = {"threads": self.options.threads, "ran": self.ours.ran}
        if self.ours.arithmetic is not None:
            extra["arithmetic"] = self.ours.arithmetic
        if self.ours.fallback_reason is not None:
            extra |= {"asked": self.ours.requested, "fallback_reason": self.ours.fallback_reason}
        backend, precision = self.backend.name, self.backend.precision
        return BenchCandidate(
            name_of(name or form, precision, backend), backend, precision, stage, run, extra,
            role="bundle", form=form, device=self.device, **fields,
        )  # fmt: skip

    def _workloads(self, kernels: PromptKernels, cost: Mapping[str, int]) -> Iterator[BenchCandidate]:
        """Every workload twice: its prompts encoded in the timed region, once for all images, and encoded before."""
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
        """Until the features are there, wherever they are."""
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
