"""Common interface to evaluated models: a bundle on a backend, or a checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import CHAIN, Bundle
from cclip_deploy.errors import CheckpointError, ParityError
from cclip_deploy.imaging.preprocess import Preprocessing
from cclip_deploy.inference.prompt_cache import Tokens
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.inference.spec import SegmenterSpec, chain_precisions
from cclip_deploy.model.config import InputForm
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.registry import OpenBackend

if TYPE_CHECKING:
    from cclip_deploy.model.checkpoint import LoadedCheckpoint

Floats = NDArray[np.float32]
THRESHOLD = 0.5


class EvaluatedModel(Protocol):
    """A network that segments an image by tokenized prompts."""

    tokenizer: PromptTokenizer
    prompt_length: int
    threshold: float

    def answer(self, pixels: Floats, rows: Sequence[Tokens]) -> Iterator[Floats]:
        """Yield the probability map (H, W) of each token row (L,) in order, with one image pass."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return a description for reports."""
        ...


class BundleModel:
    """A bundle on an open backend."""

    def __init__(self, bundle: Bundle, runs: OpenBackend) -> None:
        """Raise UsageError if the bundle lacks a graph or engine of the backend's precision."""
        self.graphs = chain_precisions(runs.backend, bundle)
        self.bundle, self.segmenter, self.runs = bundle, Segmenter.of_bundle(bundle, runs.backend), runs
        self.tokenizer = bundle.tokenizer()
        self.prompt_length, self.threshold = bundle.manifest.prompt_length, bundle.manifest.threshold

    def answer(self, pixels: Floats, rows: Sequence[Tokens]) -> Iterator[Floats]:
        return self.segmenter.answer(pixels, rows)

    def describe(self) -> dict[str, Any]:
        manifest, backend = self.bundle.manifest, self.segmenter.backend
        return {
            "kind": "bundle",
            "name": self.bundle.path.name,
            "model": manifest.model["name"],
            "checkpoint_sha256": manifest.checkpoint.sha256,
            "backend": backend.name,
            "precision": backend.precision,
            "graphs": self.graphs,
            "ran": self.runs.to_dict(),
            "image_hw": list(manifest.image_hw),
            "prompt_length": manifest.prompt_length,
        }


class CheckpointModel:
    """A checkpoint in PyTorch on the CPU, without rewrites or graphs: an independent reference for a bundle."""

    def __init__(self, loaded: LoadedCheckpoint, form: InputForm, tokenizer: PromptTokenizer) -> None:
        from cclip_deploy.runtime.pytorch import PyTorchBackend

        self.loaded, self.form = loaded, form
        self.tokenizer, self.prompt_length, self.threshold = tokenizer, form.prompt_length, THRESHOLD
        self.segmenter = Segmenter(PyTorchBackend(loaded.model), checkpoint_spec(loaded, form, tokenizer))

    def answer(self, pixels: Floats, rows: Sequence[Tokens]) -> Iterator[Floats]:
        try:
            yield from self.segmenter.answer(pixels, rows)
        except ParityError as error:
            raise CheckpointError(
                f"{self.loaded.path} gives values that are not finite, so there is no mask. Train again."
            ) from error

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "checkpoint",
            "name": self.loaded.path.name,
            "model": self.loaded.config.name,
            "checkpoint_sha256": self.loaded.sha256,
            "backend": "pytorch",
            "precision": "fp32",
            "graphs": dict.fromkeys(CHAIN, "fp32"),
            "ran": OpenBackend(self.segmenter.backend, "pytorch on cpu", "pytorch on cpu").to_dict(),
            "image_hw": list(self.form.image_hw),
            "prompt_length": self.form.prompt_length,
        }


def checkpoint_spec(loaded: LoadedCheckpoint, form: InputForm, tokenizer: PromptTokenizer) -> SegmenterSpec:
    """Return how to segment with a checkpoint at the input sizes of `form`."""
    return SegmenterSpec(
        str(loaded.path), form.image_hw, form.prompt_length, Preprocessing(), tokenizer,
        tokenizer.vocabulary_size, THRESHOLD,
    )  # fmt: skip
