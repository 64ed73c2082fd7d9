"""Accuracy of benchmark candidates relative to PyTorch, measured before they are timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.benchmark.candidate import Accuracy, Answer, BenchCandidate, Floats, Tokens
from cclip_deploy.benchmark.plan import BenchInputs, LeftOut
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ParityError
from cclip_deploy.imaging.preprocess import to_input
from cclip_deploy.parity.compare import LIMITS, limits_of, mask_dices, relative_error
from cclip_deploy.parity.reference import PICTURE_PROMPTS, SHORTEST_PROMPT, synthetic_radiographs

if TYPE_CHECKING:
    from cclip_deploy.model.network import CausalCLIPSeg

BASELINE_LIMIT = 1e-3
"""Maximum relative error of a float32 baseline; a larger one means that it computes something else."""
PROMPTS = (
    *PICTURE_PROMPTS,
    "Bilateral pulmonary infection, two infected areas, all left lung and lower right lung.",
    "Unilateral pulmonary infection, one infected area, lower right lung.",
    SHORTEST_PROMPT,
)
PAIRS = 4
USEFUL_FRACTIONS = (0.05, 0.95)
"""Range of the fraction of pixels inside a mask for which Dice is informative."""
NEAR_ZERO = 0.01
NOTE = (
    "near_zero_fraction is the fraction of pixels whose |logit| is below 1 % of the largest. Untrained weights have "
    "many of them, and a small error flips each, so relative errors and Dice of low precisions are not those of a "
    "trained network."
)


@dataclass(frozen=True)
class ReferencePairs:
    """Images (N, 3, H, W), prompts (N, L) and PyTorch's float32 logits (N, 1, H, W).

    These are the pairs of two synthetic radiographs and `PROMPTS` whose masks are closest to half of the image.
    """

    images: Floats
    tokens: Tokens
    logits: Floats
    names: tuple[tuple[int, str], ...]

    @staticmethod
    def of(bundle: Bundle, model: CausalCLIPSeg) -> ReferencePairs:
        """Compute PyTorch's logits for every image and prompt, and select pairs."""
        from cclip_deploy.runtime.pytorch import PyTorchBackend

        manifest, tokenizer = bundle.manifest, bundle.tokenizer()
        prompts = [text for text in PROMPTS if len(tokenizer.ids(text)) <= manifest.prompt_length]
        radiographs = synthetic_radiographs(manifest.image_hw)
        images = np.concatenate([to_input(pixels, manifest.image_hw, manifest.preprocessing) for pixels in radiographs])
        tokens = np.stack([tokenizer.encode(text, manifest.prompt_length) for text in prompts])
        logits = PyTorchBackend(model).all_pairs(images, tokens)
        distance = np.abs((logits >= 0).mean(axis=(2, 3)) - 0.5)
        nearest = np.argsort(distance, axis=None, kind="stable")[:PAIRS]
        rows, columns = np.unravel_index(nearest, distance.shape)
        names = tuple((int(row), prompts[column]) for row, column in zip(rows, columns, strict=True))
        return ReferencePairs(images[rows], tokens[columns], logits[rows, columns][:, None], names)

    @property
    def mask_fractions(self) -> list[float]:
        """Fraction of pixels inside each reference mask."""
        return [float(value) for value in (self.logits >= 0).mean(axis=(1, 2, 3))]

    def is_useful(self) -> list[bool]:
        """Return for each mask whether its size is in USEFUL_FRACTIONS."""
        low, high = USEFUL_FRACTIONS
        return [low <= fraction <= high for fraction in self.mask_fractions]

    def accuracy(self, answer: Answer, timed: BenchInputs, timed_logits: Floats) -> Accuracy:
        """Compare a candidate with PyTorch on every pair and on the timed input."""
        rows = range(len(self.images))
        logits = [np.asarray(answer(self.images[n : n + 1], self.tokens[n : n + 1])) for n in rows]
        errors = [relative_error(value, self.logits[n : n + 1]) for n, value in zip(rows, logits, strict=True)]
        on_timed = relative_error(np.asarray(answer(timed.image, timed.prompt)), timed_logits)
        dices = [
            float(mask_dices(value, self.logits[n : n + 1])[0, 0])
            for n, value in zip(rows, logits, strict=True)
            if self.is_useful()[n]
        ]
        mean, worst = (float(np.mean(dices)), min(dices)) if dices else (None, None)
        return Accuracy(max(errors), on_timed, mean, worst)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        largest = np.abs(self.logits).max(axis=(1, 2, 3), keepdims=True)
        pairs = zip(self.names, self.mask_fractions, self.is_useful(), strict=True)
        return {
            "reference": "PyTorch float32, published order of operations",
            "images": "synthetic radiographs",
            "pairs": [
                {"image": image, "prompt": prompt, "mask_fraction": fraction, "used_for_dice": useful}
                for (image, prompt), fraction, useful in pairs
            ],
            "near_zero_fraction": float((np.abs(self.logits) < NEAR_ZERO * largest).mean()),
            "note": NOTE,
        }


def with_accuracy(
    candidates: Iterable[BenchCandidate],
    pairs: ReferencePairs,
    timed: BenchInputs,
    reference: Answer,
    left_out: LeftOut,
) -> list[BenchCandidate]:
    """Compare candidates with PyTorch, and return them with their accuracy.

    Baselines whose error exceeds the limit of their precision are removed.

    Args:
        candidates: those without `answer` are returned unchanged.
        pairs: pairs to compare on.
        timed: the timed input.
        reference: computes PyTorch's logits.
        left_out: list to which the removed baselines are added.

    Raises:
        ParityError: a candidate of the bundle exceeds the limit of its precision.
    """
    timed_logits = reference(timed.image, timed.prompt)
    found = []
    for candidate in candidates:
        if candidate.answer is None:
            found.append(candidate)
            continue
        accuracy = pairs.accuracy(candidate.answer, timed, timed_logits)
        if _is_within(candidate, accuracy):
            found.append(replace(candidate, accuracy=accuracy))
            continue
        error = max(accuracy.relative_error, accuracy.relative_error_timed_input)
        if candidate.role == "bundle":
            raise ParityError(
                f"{candidate.name} has a relative error of {error:.3g} to PyTorch, above its limit. "
                f"Check the bundle: cclip-deploy verify BUNDLE --backend {candidate.backend}"
            )
        reason = f"computes something else: relative error {error:.3g} in {candidate.precision_class}"
        left_out.append({"name": candidate.name, "reason": reason})
    return found


def _is_within(candidate: BenchCandidate, accuracy: Accuracy) -> bool:
    """Return whether the errors are within the limits; False for NaN."""
    if candidate.role == "bundle":
        limit, timed = (limits_of(candidate.precision, name).relative_error for name in ("pictures", "seeded"))
    elif candidate.precision_class == "fp32":
        limit = timed = BASELINE_LIMIT
    else:
        limit = timed = LIMITS[candidate.precision_class].relative_error
    return accuracy.relative_error <= limit and accuracy.relative_error_timed_input <= timed
