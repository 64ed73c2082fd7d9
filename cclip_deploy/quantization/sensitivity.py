"""Evaluate variants of a bundle's image encoder by the agreement of their masks with FP32's on the same images.

Everything the variants share is computed once: inputs, FP32 logits, prompt kernels and the decoder's session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.datasets.image_sets import SetImage
from cclip_deploy.evaluation.split import encode_texts
from cclip_deploy.imaging.preprocess import to_input
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.inference.prompt_cache import PromptKernels
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.compare import mask_dices
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session

if TYPE_CHECKING:
    from onnx import ModelProto

Floats = NDArray[np.float32]
MOST_PROMPTS = 8
"""Per image; they share one image pass, but each needs memory for FP32 logits."""


@dataclass(frozen=True)
class _Case:
    image: Floats  # (1, 3, H, W)
    kernels: tuple[PromptKernels, PromptKernels]  # FP32's, and those of the evaluated precision
    logits: Floats  # FP32's, (1, P, H, W)


class SensitivityEvaluator:
    """Images with FP32 logits, on which variants of the image encoder are evaluated."""

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        images: Sequence[SetImage],
        threads: int | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Compute the FP32 logits, and the prompt kernels in the precision of the unquantized rest.

        Args:
            bundle: a deploy bundle.
            precision: of the variants; prompt encoder and mask decoder run in the precision of the unquantized rest.
            images: with their prompts, of which the first MOST_PROMPTS are used; long prompts are truncated.
            threads: of ONNX Runtime on the CPU.
            on_progress: called with a line for each image.
        """
        self.precision, self.threads = precision, threads
        self._runtime = load_onnxruntime("cpu")
        full = Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, "fp32", "cpu", threads))
        rest = Precision(precision).rest
        self._parts = {} if rest == "fp32" else self._converted_parts(bundle, rest)
        self._full = full
        self.cases: list[_Case] = []
        for number, image in enumerate(images, start=1):
            on_progress(f"FP32 masks, image {number} of {len(images)}")
            self.cases.append(self._case(bundle, image))
        full.backend.unload("image_encoder")
        full.backend.unload("prompt_encoder")

    def evaluate(self, model: ModelProto, cases: Sequence[int]) -> dict[int, NDArray[np.float64]]:
        """Return Dice to FP32's masks for each prompt, (P,), by image number, with `model` as the image encoder."""
        session = self._session(model)
        found = {}
        for number in cases:
            case = self.cases[number]
            features = session.run(["features"], {"image": case.image})[0]
            found[number] = mask_dices(self._decode(features, case.kernels[1]), case.logits)[0]
        return found

    def _case(self, bundle: Bundle, source: SetImage) -> _Case:
        manifest = bundle.manifest
        image = to_input(read_image(source.path).pixels, manifest.image_hw, manifest.preprocessing)
        rows, _ = encode_texts(source.prompts[:MOST_PROMPTS], bundle.tokenizer(), manifest.prompt_length)
        kernels = self._full.encode_tokens(rows)
        logits = self._full.decode(self._full.run_image_encoder(image), kernels)
        if not self._parts:
            return _Case(image, (kernels, kernels), logits)
        names = ("kernel", "tap_bias", "bias")
        values = self._parts["prompt_encoder"].run(list(names), {"tokens": np.stack(rows)})
        return _Case(image, (kernels, PromptKernels(**dict(zip(names, values, strict=True)))), logits)

    def _decode(self, features: Floats, kernels: PromptKernels) -> Floats:
        if not self._parts:
            return self._full.decode(features, kernels)
        given = {"features": features, "kernel": kernels.kernel, "tap_bias": kernels.tap_bias, "bias": kernels.bias}
        logits: Floats = self._parts["mask_decoder"].run(["logits"], given)[0]
        return logits

    def _converted_parts(self, bundle: Bundle, rest: str) -> Mapping[str, Any]:
        from cclip_deploy.graph.precision.float16 import to_bf16, to_fp16

        to_16_bits = to_bf16 if rest == "bf16" else to_fp16
        names = ("prompt_encoder", "mask_decoder")
        return {name: self._session(to_16_bits(load_model(bundle, name))) for name in names}

    def _session(self, model: ModelProto) -> Any:
        """Return a session that rounds where the graph does, as in `verify`."""
        from cclip_deploy.graph.precision.rounding import emulate_rounding, has_16_bit_types

        emulated = emulate_rounding(model) if has_16_bit_types(model) else model
        return make_session(self._runtime, emulated.SerializeToString(), "cpu", self.threads, self.precision)
