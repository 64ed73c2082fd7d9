"""The segmenter: pictures and prompts in, probabilities out, one image pass for any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import CHAIN, TOKENIZER, Bundle
from cclip_deploy.errors import BundleError, ParityError, UsageError
from cclip_deploy.imaging.preprocess import to_input, to_source
from cclip_deploy.inference.prompt_cache import (
    CacheCounts,
    KernelFolder,
    KernelOrigin,
    PromptCache,
    PromptKernels,
    Tokens,
)
from cclip_deploy.runtime.backend import Backend, DeviceBackend, DeviceTensor, TensorsOrArrays
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend

PROMPTS_AT_ONCE = 16

Floats = NDArray[np.float32]
Features = NDArray[np.float32] | DeviceTensor
"""A picture's features; a backend with memory of its own keeps them there."""


class Segmenter:
    """A bundle on a backend: one image pass for any number of prompts, and each prompt computed once for all images.

    Prompt kernels are kept in memory, the last used ones, and in the folder `prompt_cache` where one is given.
    """

    def __init__(self, bundle: Bundle, backend: Backend, prompt_cache: Path | None = None) -> None:
        """Open the tokenizer and the prompt cache; graphs are loaded when they are first needed.

        Raises:
            UsageError: the bundle is a plain one, lacks a graph of the backend's precision, or is another than the
                backend's; or `prompt_cache` is a file.
            BundleError: the tokenizer has more tokens than the network.
            EnvironmentIssue: `prompt_cache` cannot be written.
        """
        if bundle.manifest.form != "deploy":
            raise UsageError(
                f"{bundle.path} was exported with --plain, as a reference for benchmarks. Export it without --plain."
            )
        if getattr(backend, "bundle", bundle).identity != bundle.identity:
            raise UsageError(
                f"The backend was opened with another bundle than {bundle.path} is now. Open both from one Bundle."
            )
        self.bundle = bundle
        self.backend = backend
        self.precisions = chain_precisions(backend, bundle)
        self._tokenizer = bundle.tokenizer()
        self._vocabulary_size = _vocabulary_size(bundle)
        folder = None if prompt_cache is None else KernelFolder(prompt_cache, kernel_origin(bundle, backend.precision))
        self._cache = PromptCache(folder)

    @property
    def prompt_counts(self) -> CacheCounts:
        """How many prompts were found in memory, found on disk, computed, and computed again for a damaged file."""
        return self._cache.counts

    def encode_image(self, pixels: Floats) -> Features:
        """Pixels (H, W) or (H, W, 3) in [0, 1], any size -> features (1, h, w, 256) of the bundle's image size."""
        image = self._network_input(pixels)
        if isinstance(self.backend, DeviceBackend):
            return self.backend.run_on_device("image_encoder", {"image": image}, ["features"])["features"]
        return self.backend.run("image_encoder", {"image": image})["features"]

    def image_outputs(self, pixels: Floats) -> dict[str, Floats]:
        """All that the image encoder gives: features, and causal masks where it was exported with them."""
        return self.backend.run("image_encoder", {"image": self._network_input(pixels)})

    def _network_input(self, pixels: Floats) -> Floats:
        manifest = self.bundle.manifest
        return to_input(pixels, manifest.image_hw, manifest.preprocessing)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptKernels:
        """Kernels of the prompts, in order; 9 kB a prompt, all at once.

        Raises:
            UsageError: there is no prompt.
            PromptError: a prompt is empty or too long, before anything is computed.
        """
        return self.encode_tokens(self._token_rows(prompts))

    def encode_tokens(self, rows: Sequence[Tokens]) -> PromptKernels:
        """As `encode_prompts`, for token rows (L,) that are made already, such as those of prompts that were cut.

        UsageError where an id is outside the vocabulary: not every runtime refuses it.
        """
        return PromptKernels.join(list(self._kernel_parts(rows)))

    def prepare(self, prompts: Sequence[str]) -> None:
        """Check all prompts and, if memory has room for them, compute them and free the prompt encoder's memory.

        For programs that segment pictures with the same prompts: the image encoder, loaded after it, then takes the
        memory that the prompt encoder left. Raises as `encode_prompts` does.
        """
        rows = self._token_rows(prompts)
        distinct = list({row.tobytes(): row for row in rows}.values())
        if len(distinct) <= self._cache.capacity:
            for _ in self._kernel_parts(distinct):
                pass
            self.backend.unload("prompt_encoder")

    def decode(self, features: Features, kernels: PromptKernels) -> Floats:
        """Features (B, h, w, 256) x P prompts -> logits (B, P, h, w)."""
        parts = [self._decode_part(features, part) for part in _parts(kernels)]
        return np.concatenate(parts, axis=1)

    def probabilities(
        self, pixels: Floats, prompts: Sequence[str], features: Features | None = None
    ) -> Iterator[Floats]:
        """For each prompt, in order, the probability (H, W) of every pixel of the source; one image pass in all.

        Lazy, and a few prompts at a time, so that ten thousand prompts need no more memory than sixteen. Raises as
        `encode_prompts` does. `features` are those of `pixels`, where the caller has run the image pass.
        """
        yield from self.answer(pixels, self._token_rows(prompts), features)

    def answer(self, pixels: Floats, rows: Sequence[Tokens], features: Features | None = None) -> Iterator[Floats]:
        """As `probabilities`, for token rows (L,) that are made already, such as an empty sentence's."""
        source_hw = (pixels.shape[0], pixels.shape[1])
        for part in self._kernel_parts(rows):
            features = self.encode_image(pixels) if features is None else features
            for logits in self._decode_part(features, part)[0]:
                yield to_source(sigmoid(logits), source_hw)

    def warm_up(self) -> None:
        """Load every graph that `probabilities` needs."""
        for graph in ("prompt_encoder", "image_encoder", "mask_decoder"):
            self.backend.load(graph)

    def _token_rows(self, prompts: Sequence[str]) -> list[Tokens]:
        if not prompts:
            raise UsageError("There is no prompt. Give at least one.")
        length = self.bundle.manifest.prompt_length
        return [self._tokenizer.encode(prompt, length) for prompt in prompts]

    def _kernel_parts(self, rows: Sequence[Tokens]) -> Iterator[PromptKernels]:
        for row in rows:
            if row.size and not 0 <= int(row.min()) <= int(row.max()) < self._vocabulary_size:
                raise UsageError(
                    f"Token ids reach from {row.min()} to {row.max()}; those of {self.bundle.path} are 0 to "
                    f"{self._vocabulary_size - 1}. Make them with the bundle's own tokenizer."
                )
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            yield self._cache.kernels(rows[start : start + PROMPTS_AT_ONCE], self._run_prompt_encoder)

    def _run_prompt_encoder(self, tokens: Tokens) -> PromptKernels:
        outputs = self.backend.run("prompt_encoder", {"tokens": tokens})
        return PromptKernels(outputs["kernel"], outputs["tap_bias"], outputs["bias"])

    def _decode_part(self, features: Features, part: PromptKernels) -> Floats:
        prompt = {"kernel": part.kernel, "tap_bias": part.tap_bias, "bias": part.bias}
        if isinstance(self.backend, DeviceBackend):
            inputs: TensorsOrArrays = {"features": features, **prompt}
            logits = self.backend.run("mask_decoder", inputs)["logits"]
        else:
            logits = self.backend.run("mask_decoder", {"features": np.asarray(features), **prompt})["logits"]
        if not np.isfinite(logits).all():
            raise ParityError(
                f"{self.bundle.path} gave logits that are not finite, so no mask. Check it: cclip-deploy verify BUNDLE."
            )
        return logits


def _vocabulary_size(bundle: Bundle) -> int:
    """Of the network, which has to have every token of the tokenizer; ids beyond it are outside the weights."""
    tokens = bundle.tokenizer().vocabulary_size
    size = bundle.manifest.model.get("vocabulary_size", tokens)
    if not isinstance(size, int) or size < tokens:
        raise BundleError(
            f"{bundle.path} has a tokenizer of {tokens} tokens and a network of {size}. Export the bundle again."
        )
    return size


def sigmoid(logits: Floats) -> Floats:
    """Probabilities of logits, without overflow for large ones."""
    probabilities: Floats = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    return probabilities


def chain_precisions(backend: Backend, bundle: Bundle) -> dict[str, str]:
    """What each graph that serves runs in on a backend: that of the backend, or the rest's where none can be quantized.

    UsageError, where the bundle lacks one of the graphs or engines, names the command that makes it.
    """
    if isinstance(backend, TensorRtBackend):
        return {graph: backend.entry(graph).precision for graph in CHAIN}
    return {graph: entry.precision for graph, entry in bundle.chain(backend.precision).items()}


def kernel_origin(bundle: Bundle, precision: str) -> KernelOrigin:
    """What decides the prompt kernels of a bundle; UsageError where it has no prompt encoder of that precision."""
    entry = bundle.graph_in("prompt_encoder", precision)
    channels = [tensor.shape[-1] for tensor in entry.outputs if tensor.name == "kernel"]
    if len(channels) != 1 or not isinstance(channels[0], int):
        raise BundleError(f"{bundle.path} has a prompt encoder without a kernel of fixed width. Export it again.")
    length = bundle.manifest.prompt_length
    return KernelOrigin(entry.sha256, entry.precision, bundle.sums[TOKENIZER], length, channels[0])


def _parts(kernels: PromptKernels) -> Iterator[PromptKernels]:
    for start in range(0, len(kernels), PROMPTS_AT_ONCE):
        yield kernels.part(start, start + PROMPTS_AT_ONCE)
