"""Explain a segmentation by the causal masks and the confounding features of the neck."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import CheckpointError, ParityError, UsageError
from cclip_deploy.imaging.preprocess import to_input, to_source
from cclip_deploy.inference.graph_chain import GraphChain, sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from cclip_deploy.model.checkpoint import LoadedCheckpoint

Floats = NDArray[np.float32]
MASKS = {"mask3": "M3", "mask4": "M4", "mask5": "M5"}
CONFOUNDING = "confounding_features"


@dataclass(frozen=True)
class Seen:
    """Outputs of the neck for one image, each averaged over its 512 channels: (H/16, W/16)."""

    masks: Mapping[str, Floats]
    """Causal masks M3, M4 and M5, in [0, 1]; empty if the bundle does not have these outputs."""
    confounding: Floats | None
    """Confounding features, at least 0; None if the bundle does not have this output."""
    features: Floats | None
    """Input of the mask decoder from the same image pass, (1, H, W, 256); None for a checkpoint."""


class Explainer(Protocol):
    """Explains one image at a time."""

    def look(self, pixels: Floats) -> Seen:
        """Return the neck's outputs for an image: pixels (H, W) or (H, W, 3) in [0, 1]."""
        ...

    def confounding_answer(self, prompt: str) -> Floats | None:
        """Return the confounding branch's probability (H, W) for the last image; None if it is not available."""
        ...


class BundleExplainer:
    """Explains by further outputs of a bundle's image encoder, from the image pass that the masks come from."""

    def __init__(self, bundle: Bundle, segmenter: GraphChain) -> None:
        """Raise UsageError if the bundle was exported without those outputs."""
        outputs = {output.name for output in bundle.graph("image_encoder").outputs}
        if not outputs & {*MASKS, CONFOUNDING}:
            raise UsageError(
                f"{bundle.path} has neither causal masks nor confounding features as outputs. Export it with them: "
                "cclip-deploy export CHECKPOINT -o BUNDLE --with-masks --with-confounding. Or give --checkpoint FILE."
            )
        self._segmenter = segmenter

    def look(self, pixels: Floats) -> Seen:
        outputs = self._segmenter.image_outputs(pixels)
        _check_finite(self._segmenter.spec.name, outputs)
        masks = {MASKS[name]: _mean(outputs[name]) for name in MASKS if name in outputs}
        confounding = _mean(outputs[CONFOUNDING]) if CONFOUNDING in outputs else None
        return Seen(masks, confounding, outputs["features"])

    def confounding_answer(self, prompt: str) -> None:
        """Return None: bundles have no confounding head."""


class CheckpointExplainer:
    """Explains by the bundle's checkpoint in PyTorch, with all maps and the confounding branch's probability."""

    def __init__(self, bundle: Bundle, loaded: LoadedCheckpoint) -> None:
        """Raise CheckpointError if the bundle was exported from another checkpoint."""
        if loaded.sha256 != bundle.manifest.checkpoint.sha256:
            raise CheckpointError(
                f"{loaded.path} has SHA-256 {loaded.sha256[:12]}; {bundle.path} was exported from "
                f"{bundle.manifest.checkpoint.name}, {bundle.manifest.checkpoint.sha256[:12]}. Use that checkpoint."
            )
        self._model, self._manifest = loaded.model.eval(), bundle.manifest
        self._tokenizer = bundle.tokenizer()
        self._last: tuple[Tensor, tuple[int, int]] | None = None

    def look(self, pixels: Floats) -> Seen:
        import torch

        image = torch.from_numpy(to_input(pixels, self._manifest.image_hw, self._manifest.preprocessing))
        with torch.inference_mode():
            neck = self._model.neck(self._model.image_tower(image))
        outputs = {name: mask.numpy() for name, mask in zip(MASKS, neck.masks, strict=True)}
        outputs[CONFOUNDING] = neck.confounding.numpy()
        _check_finite("The checkpoint", outputs)
        self._last = neck.confounding, (pixels.shape[0], pixels.shape[1])
        return Seen({MASKS[name]: _mean(outputs[name]) for name in MASKS}, _mean(outputs[CONFOUNDING]), None)

    def confounding_answer(self, prompt: str) -> Floats | None:
        import torch

        if self._last is None:
            return None
        features, source_hw = self._last
        tokens = torch.from_numpy(self._tokenizer.encode(prompt, self._manifest.prompt_length))[None]
        with torch.inference_mode():
            logits = self._model.confounding_head(features, self._model.text_tower(tokens)).numpy()
        _check_finite("The checkpoint", {"confounding logits": logits})
        return to_source(sigmoid(logits[0, 0]), source_hw)


def open_explainer(bundle: Bundle, segmenter: GraphChain, checkpoint: Path | None) -> Explainer:
    """Return a `CheckpointExplainer` if a checkpoint is given, else a `BundleExplainer`; raise like these."""
    if checkpoint is None:
        return BundleExplainer(bundle, segmenter)
    from cclip_deploy.environment.packages import require_export_packages

    require_export_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    return CheckpointExplainer(bundle, load_checkpoint(checkpoint))


def _mean(values: Floats) -> Floats:
    """(1, 512, h, w) -> (h, w)."""
    mean: Floats = values[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def _check_finite(source: str, outputs: Mapping[str, Floats]) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ParityError(
                f"{source} gave {name} that are not finite. Check the bundle: cclip-deploy verify BUNDLE."
            )
