"""Segment images by text prompts: one image pass serves any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import CHAIN, TOKENIZER, Bundle
from cclip_deploy.errors import BundleError, ParityError, UsageError
from cclip_deploy.imaging.preprocess import Preprocessing, to_input, to_source
from cclip_deploy.inference.prompt_cache import (
    CacheCounts,
    KernelFolder,
    KernelOrigin,
    PromptCache,
    PromptKernels,
    Tokens,
)
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.backend import Backend, DeviceBackend, DeviceTensor, TensorsOrArrays
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend

PROMPTS_AT_ONCE = 16
"""Largest number of prompts in one run of the prompt encoder or mask decoder."""

Floats = NDArray[np.float32]
Features = NDArray[np.float32] | DeviceTensor
"""Output of the image encoder, (B, h, w, 256); it stays in device memory on backends that have their own."""


@dataclass(frozen=True)
class SegmenterSpec:
    """How a network's inputs are prepared and its outputs are read.

    Attributes:
        name: the bundle or checkpoint, for messages.
        image_hw: height and width of the network's input.
        prompt_length: number of tokens in a prompt.
        preprocessing: resizing and normalization of images.
        tokenizer: splits prompts into tokens.
        vocabulary_size: of the network; token ids are smaller.
        threshold: probability from which a pixel is part of the mask.
    """

    name: str
    image_hw: tuple[int, int]
    prompt_length: int
    preprocessing: Preprocessing
    tokenizer: PromptTokenizer
    vocabulary_size: int
    threshold: float


class Segmenter:
    """Segments images by text prompts on a backend. The kernel of a prompt is computed once and cached."""

    def __init__(self, backend: Backend, spec: SegmenterSpec, cache: PromptCache | None = None) -> None:
        """Use a backend's graphs, which are loaded on first use; without `cache`, kernels are cached in memory."""
        self.backend = backend
        self.spec = spec
        self._cache = PromptCache() if cache is None else cache

    @staticmethod
    def of_bundle(bundle: Bundle, backend: Backend, prompt_cache: Path | None = None) -> Segmenter:
        """Return a segmenter for a bundle; prompt kernels are also stored in the folder `prompt_cache`, if given.

        Raises:
            UsageError: see `bundle_spec`; or `prompt_cache` is a file.
            BundleError: see `bundle_spec`.
            EnvironmentIssue: `prompt_cache` cannot be written.
        """
        spec = bundle_spec(bundle, backend)
        folder = None if prompt_cache is None else KernelFolder(prompt_cache, kernel_origin(bundle, backend.precision))
        return Segmenter(backend, spec, PromptCache(folder))

    @property
    def prompt_counts(self) -> CacheCounts:
        """How many prompts came from memory, from disk, were computed, or were recomputed for a damaged file."""
        return self._cache.counts

    def encode_image(self, pixels: Floats) -> Features:
        """Return the features (1, h, w, 256) of an image: pixels (H, W) or (H, W, 3) in [0, 1], any size."""
        return self.run_image_encoder(self._network_input(pixels))

    def image_outputs(self, pixels: Floats) -> dict[str, Floats]:
        """Return all outputs of the image encoder: features, and the causal masks if they were exported."""
        return self.backend.run("image_encoder", {"image": self._network_input(pixels)})

    def encode_prompts(self, prompts: Sequence[str]) -> PromptKernels:
        """Return the kernels of the prompts, in order; 9 kB per prompt.

        Raises:
            UsageError: there is no prompt.
            PromptError: a prompt is empty or too long; raised before anything is computed.
        """
        return self.encode_tokens(self._token_rows(prompts))

    def encode_tokens(self, rows: Sequence[Tokens]) -> PromptKernels:
        """Return the kernels of token rows (L,), in order.

        Raises:
            UsageError: a token id is outside the vocabulary, which not every runtime rejects.
        """
        return PromptKernels.join(list(self._kernel_parts(rows)))

    def prepare(self, prompts: Sequence[str]) -> None:
        """Validate all prompts, and compute and cache their kernels if they fit into memory.

        The prompt encoder is unloaded then, so that the image encoder can use its memory. Raises like `encode_prompts`.
        """
        rows = self._token_rows(prompts)
        distinct = list({row.tobytes(): row for row in rows}.values())
        if len(distinct) <= self._cache.capacity:
            for _ in self._kernel_parts(distinct):
                pass
            self.backend.unload("prompt_encoder")

    def decode(self, features: Features, kernels: PromptKernels) -> Floats:
        """Return the logits (B, P, h, w) of features (B, h, w, 256) and the kernels of P prompts.

        Raises:
            ParityError: logits are not finite.
        """
        parts = (kernels.part(start, start + PROMPTS_AT_ONCE) for start in range(0, len(kernels), PROMPTS_AT_ONCE))
        return np.concatenate([self._decode_part(features, part) for part in parts], axis=1)

    def probabilities(
        self, pixels: Floats, prompts: Sequence[str], features: Features | None = None
    ) -> Iterator[Floats]:
        """Yield for each prompt, in order, the probability (H, W) of every pixel of the image.

        The image encoder runs once, and prompts are decoded `PROMPTS_AT_ONCE` at a time, so memory does not grow with
        the number of prompts. Raises like `encode_prompts`.

        Args:
            pixels: (H, W) or (H, W, 3) in [0, 1], any size.
            prompts: at least one.
            features: of `pixels`, if they were computed before.
        """
        yield from self.answer(pixels, self._token_rows(prompts), features)

    def answer(self, pixels: Floats, rows: Sequence[Tokens], features: Features | None = None) -> Iterator[Floats]:
        """Like `probabilities`, for token rows (L,) instead of prompts."""
        source_hw = (pixels.shape[0], pixels.shape[1])
        for part in self._kernel_parts(rows):
            features = self.encode_image(pixels) if features is None else features
            for logits in self._decode_part(features, part)[0]:
                yield to_source(sigmoid(logits), source_hw)

    def warm_up(self) -> None:
        """Load every graph that `probabilities` needs."""
        for graph in ("prompt_encoder", "image_encoder", "mask_decoder"):
            self.backend.load(graph)

    def run_image_encoder(self, image: Floats) -> Features:
        """Return the features (B, h, w, 256) of preprocessed images (B, 3, H, W)."""
        if isinstance(self.backend, DeviceBackend):
            return self.backend.run_on_device("image_encoder", {"image": image}, ["features"])["features"]
        return self.backend.run("image_encoder", {"image": image})["features"]

    def run_prompt_encoder(self, tokens: Tokens) -> PromptKernels:
        """Return the kernels of tokens (P, L), computed without the cache, `PROMPTS_AT_ONCE` in each run."""
        parts = (tokens[start : start + PROMPTS_AT_ONCE] for start in range(0, len(tokens), PROMPTS_AT_ONCE))
        outputs = [self.backend.run("prompt_encoder", {"tokens": part}) for part in parts]
        return PromptKernels.join([PromptKernels(o["kernel"], o["tap_bias"], o["bias"]) for o in outputs])

    def run_mask_decoder(self, features: Features, kernels: PromptKernels) -> Floats:
        """Return the logits (B, P, h, w) of features and kernels in one run, without checking them."""
        prompt = {"kernel": kernels.kernel, "tap_bias": kernels.tap_bias, "bias": kernels.bias}
        if isinstance(self.backend, DeviceBackend):
            inputs: TensorsOrArrays = {"features": features, **prompt}
            return self.backend.run("mask_decoder", inputs)["logits"]
        return self.backend.run("mask_decoder", {"features": np.asarray(features), **prompt})["logits"]

    def _network_input(self, pixels: Floats) -> Floats:
        return to_input(pixels, self.spec.image_hw, self.spec.preprocessing)

    def _token_rows(self, prompts: Sequence[str]) -> list[Tokens]:
        if not prompts:
            raise UsageError("There is no prompt. Give at least one.")
        return [self.spec.tokenizer.encode(prompt, self.spec.prompt_length) for prompt in prompts]

    def _kernel_parts(self, rows: Sequence[Tokens]) -> Iterator[PromptKernels]:
        for row in rows:
            if row.size and not 0 <= int(row.min()) <= int(row.max()) < self.spec.vocabulary_size:
                raise UsageError(
                    f"Token ids range from {row.min()} to {row.max()}; {self.spec.name} allows 0 to "
                    f"{self.spec.vocabulary_size - 1}. Use its own tokenizer."
                )
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            yield self._cache.kernels(rows[start : start + PROMPTS_AT_ONCE], self.run_prompt_encoder)

    def _decode_part(self, features: Features, part: PromptKernels) -> Floats:
        logits = self.run_mask_decoder(features, part)
        if not np.isfinite(logits).all():
            raise ParityError(
                f"{self.spec.name} gave logits that are not finite, so there is no mask. Check the bundle: "
                "cclip-deploy verify BUNDLE."
            )
        return logits


def bundle_spec(bundle: Bundle, backend: Backend) -> SegmenterSpec:
    """Return the spec of a bundle, after checking that the backend can segment with it.

    Raises:
        UsageError: the bundle was exported with --plain, lacks a graph or engine of the backend's precision, or is not
            the one that the backend was opened with.
        BundleError: the tokenizer has more tokens than the network.
    """
    manifest = bundle.manifest
    if manifest.form != "deploy":
        raise UsageError(
            f"{bundle.path} was exported with --plain, as a reference for benchmarks. Export it without --plain."
        )
    if getattr(backend, "bundle", bundle).identity != bundle.identity:
        raise UsageError(f"The backend was opened with another bundle than {bundle.path}. Open both from one Bundle.")
    chain_precisions(backend, bundle)
    tokenizer = bundle.tokenizer()
    tokens = tokenizer.vocabulary_size
    vocabulary_size = manifest.model.get("vocabulary_size", tokens)
    if not isinstance(vocabulary_size, int) or vocabulary_size < tokens:
        raise BundleError(
            f"{bundle.path} has a tokenizer of {tokens} tokens and a network of {vocabulary_size}. Export the bundle "
            "again."
        )
    return SegmenterSpec(
        str(bundle.path), manifest.image_hw, manifest.prompt_length, manifest.preprocessing, tokenizer,
        vocabulary_size, manifest.threshold,
    )  # fmt: skip


def sigmoid(logits: Floats) -> Floats:
    """Return the probabilities of logits, without overflow for large ones."""
    probabilities: Floats = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    return probabilities


def chain_precisions(backend: Backend, bundle: Bundle) -> dict[str, str]:
    """Return the precision of each graph that segments on a backend.

    Raises:
        UsageError: the bundle lacks one of the graphs or engines; the message names the command that builds it.
    """
    if isinstance(backend, TensorRtBackend):
        return {graph: backend.entry(graph).precision for graph in CHAIN}
    return {graph: entry.precision for graph, entry in bundle.chain(backend.precision).items()}


def kernel_origin(bundle: Bundle, precision: str) -> KernelOrigin:
    """Return what the prompt kernels of a bundle depend on besides the prompt.

    Raises:
        UsageError: the bundle has no prompt encoder of that precision.
        BundleError: the prompt encoder's kernel has no fixed number of channels.
    """
    entry = bundle.graph_in("prompt_encoder", precision)
    channels = [tensor.shape[-1] for tensor in entry.outputs if tensor.name == "kernel"]
    if len(channels) != 1 or not isinstance(channels[0], int):
        raise BundleError(f"{bundle.path} has a prompt encoder without a kernel of fixed width. Export it again.")
    length = bundle.manifest.prompt_length
    return KernelOrigin(entry.sha256, entry.precision, bundle.sums[TOKENIZER], length, channels[0])
