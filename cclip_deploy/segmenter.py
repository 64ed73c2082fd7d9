"""The segmenter: pictures and prompts in, probabilities out, one image pass for any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle import Bundle
from cclip_deploy.data.preprocess import to_input, to_source
from cclip_deploy.errors import ParityError, UsageError
from cclip_deploy.runtime.backend import Backend

PROMPTS_AT_ONCE = 16

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptKernels:
    """The last convolutions of P prompts: kernel (P, 9, 256), tap_bias (P, 9), bias (P,), all float32."""

    kernel: Floats
    tap_bias: Floats
    bias: Floats

    def __len__(self) -> int:
        return len(self.bias)

    def part(self, start: int, stop: int) -> PromptKernels:
        """The prompts from `start` to before `stop`."""
        return PromptKernels(self.kernel[start:stop], self.tap_bias[start:stop], self.bias[start:stop])


class Segmenter:
    """A bundle on a backend. Prompt kernels are kept for the segmenter's life, because prompts repeat."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        if bundle.manifest.form != "deploy":
            raise UsageError(
                f"{bundle.path} was exported with --plain, as a reference for benchmarks. Export it without --plain."
            )
        self.bundle = bundle
        self.backend = backend
        self._tokenizer = bundle.tokenizer()
        self._kernels: dict[str, PromptKernels] = {}

    def encode_image(self, pixels: Floats) -> Floats:
        """Pixels (H, W) or (H, W, 3) in [0, 1], any size -> features (1, h, w, 256) of the bundle's image size."""
        manifest = self.bundle.manifest
        image = to_input(pixels, manifest.image_hw, manifest.preprocessing)
        return self.backend.run("image_encoder", {"image": image})["features"]

    def encode_prompts(self, prompts: Sequence[str]) -> PromptKernels:
        """Kernels of the prompts, in order; each distinct prompt is computed once.

        Raises:
            PromptError: a prompt is empty or too long, before anything is computed.
        """
        if not prompts:
            raise UsageError("There is no prompt. Give at least one.")
        length = self.bundle.manifest.prompt_length
        rows = {prompt: self._tokenizer.encode(prompt, length) for prompt in prompts}
        fresh = [prompt for prompt in rows if prompt not in self._kernels]
        for chunk in _chunks(fresh):
            outputs = self.backend.run("prompt_encoder", {"tokens": np.stack([rows[prompt] for prompt in chunk])})
            computed = PromptKernels(outputs["kernel"], outputs["tap_bias"], outputs["bias"])
            self._kernels.update({prompt: computed.part(i, i + 1) for i, prompt in enumerate(chunk)})
        kept = [self._kernels[prompt] for prompt in prompts]
        return PromptKernels(
            np.concatenate([k.kernel for k in kept]),
            np.concatenate([k.tap_bias for k in kept]),
            np.concatenate([k.bias for k in kept]),
        )

    def decode(self, features: Floats, kernels: PromptKernels) -> Floats:
        """Features (B, h, w, 256) x P prompts -> logits (B, P, h, w)."""
        parts = [self._decode_part(features, part) for part in _parts(kernels)]
        return np.concatenate(parts, axis=1)

    def probabilities(self, pixels: Floats, prompts: Sequence[str]) -> Iterator[Floats]:
        """For each prompt, in order, the probability (H, W) of every pixel of the source; one image pass in all.

        Lazy, and a few prompts at a time, so that ten thousand prompts need no more memory than sixteen.
        """
        kernels = self.encode_prompts(prompts)
        features = self.encode_image(pixels)
        source_hw = (pixels.shape[0], pixels.shape[1])
        for part in _parts(kernels):
            for logits in self._decode_part(features, part)[0]:
                yield to_source(sigmoid(logits), source_hw)

    def warm_up(self) -> None:
        """Load every graph that `probabilities` needs."""
        for graph in ("prompt_encoder", "image_encoder", "mask_decoder"):
            self.backend.load(graph)

    def _decode_part(self, features: Floats, part: PromptKernels) -> Floats:
        inputs = {"features": features, "kernel": part.kernel, "tap_bias": part.tap_bias, "bias": part.bias}
        logits = self.backend.run("mask_decoder", inputs)["logits"]
        if not np.isfinite(logits).all():
            raise ParityError(
                f"{self.bundle.path} gave logits that are not finite, so no mask. Check it: cclip-deploy verify BUNDLE."
            )
        return logits


def sigmoid(logits: Floats) -> Floats:
    """Probabilities of logits, without overflow for large ones."""
    probabilities: Floats = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    return probabilities


def _chunks(prompts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        yield prompts[start : start + PROMPTS_AT_ONCE]


def _parts(kernels: PromptKernels) -> Iterator[PromptKernels]:
    for start in range(0, len(kernels), PROMPTS_AT_ONCE):
        yield kernels.part(start, start + PROMPTS_AT_ONCE)
