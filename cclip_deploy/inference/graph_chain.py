"""The three graphs of a bundle: image features and cached prompt kernels are combined into masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import CHAIN
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.imaging.preprocess import to_input, to_source
from cclip_deploy.inference.prompt_cache import CacheCounts, PromptCache, PromptKernels, Tokens
from cclip_deploy.inference.spec import SegmenterSpec
from cclip_deploy.prompts.spelling import prompt_list
from cclip_deploy.runtime.backend import Backend, DeviceBackend, DeviceTensor, TensorsOrArrays

PROMPTS_AT_ONCE = 16
"""Largest number of prompts in one run of the prompt encoder or mask decoder."""

Floats = NDArray[np.float32]
Features = NDArray[np.float32] | DeviceTensor
"""Output of the image encoder, (B, h, w, 256); it stays in device memory on backends that have their own."""


class GraphChain:
    """Runs the graphs of `CHAIN` on a backend. The kernel of a prompt is computed once and cached."""

    def __init__(self, backend: Backend, spec: SegmenterSpec, cache: PromptCache | None = None) -> None:
        """Use a backend's graphs, which are loaded on first use; without `cache`, kernels are cached in memory."""
        self.spec = spec
        self._backend = backend
        self._cache = PromptCache() if cache is None else cache
        self._is_closed = False

    @property
    def backend(self) -> Backend:
        """The backend. Raises UsageError if the segmenter was closed."""
        if self._is_closed:
            raise UsageError(f"The segmenter of {self.spec.name} was closed. Load it again: Segmenter.load(PATH).")
        return self._backend

    @property
    def prompt_counts(self) -> CacheCounts:
        """How many prompts came from memory, from disk, were computed, or were recomputed for a damaged file."""
        return self._cache.counts

    def encode_image(self, pixels: Floats) -> Features:
        """Return the features (1, h, w, 256) of an image: pixels (H, W) or (H, W, 3) in [0, 1], any size."""
        return self.encode_images([pixels])

    def encode_images(self, images: Sequence[Floats]) -> Features:
        """Return the features (B, h, w, 256) of images of any sizes: pixels (H, W) or (H, W, 3) in [0, 1]."""
        return self.run_image_encoder(np.concatenate([self._network_input(pixels) for pixels in images]))

    def image_outputs(self, pixels: Floats) -> dict[str, Floats]:
        """Return all outputs of the image encoder: features, and the causal masks if they were exported."""
        return self.backend.run("image_encoder", {"image": self._network_input(pixels)})

    def encode_prompts(self, prompts: str | Sequence[str]) -> PromptKernels:
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

    def prepare(self, prompts: str | Sequence[str]) -> None:
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
        self, pixels: Floats, prompts: str | Sequence[str], features: Features | None = None
    ) -> Iterator[Floats]:
        """Yield for each prompt, in order, the probability (H, W) of every pixel of the image.

        The image encoder runs once, and prompts are decoded `PROMPTS_AT_ONCE` at a time, so memory does not grow with
        the number of prompts. Raises like `encode_prompts`.

        Args:
            pixels: (H, W) or (H, W, 3) in [0, 1], any size.
            prompts: a string is one prompt; or a list of prompts.
            features: of `pixels`, if they were computed before.
        """
        yield from self.answer(pixels, self._token_rows(prompts), features)

    def answer(self, pixels: Floats, rows: Sequence[Tokens], features: Features | None = None) -> Iterator[Floats]:
        """Like `probabilities`, for token rows (L,) instead of prompts."""
        for (probability,) in self.answers([pixels], rows, features):
            yield probability

    def answers(
        self, images: Sequence[Floats], rows: Sequence[Tokens], features: Features | None = None
    ) -> Iterator[tuple[Floats, ...]]:
        """Yield for each token row (L,), in order, the probabilities (H, W) of all images, which pass together."""
        for part in self._kernel_parts(rows):
            features = self.encode_images(images) if features is None else features
            logits = self._decode_part(features, part)  # (B, P, h, w)
            for column in range(len(part)):
                yield tuple(
                    to_source(sigmoid(row[column]), (pixels.shape[0], pixels.shape[1]))
                    for row, pixels in zip(logits, images, strict=True)
                )

    def warm_up(self) -> None:
        """Load every graph that `probabilities` needs."""
        for graph in CHAIN:
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

    def _token_rows(self, prompts: str | Sequence[str]) -> list[Tokens]:
        listed = prompt_list(prompts)
        if not listed:
            raise UsageError("There is no prompt. Give at least one.")
        return [self.spec.tokenizer.encode(prompt, self.spec.prompt_length) for prompt in listed]

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


def sigmoid(logits: Floats) -> Floats:
    """Return the probabilities of logits, without overflow for large ones."""
    probabilities: Floats = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    return probabilities
