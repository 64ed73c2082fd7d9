"""What a benchmark's candidates are compared on before they are timed, and which of them are left out for it."""

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
from cclip_deploy.parity.reference import PICTURE_PROMPTS, SHORTEST_PROMPT, drawn_films

if TYPE_CHECKING:
    from cclip_deploy.model.network import CausalCLIPSeg

BASELINE_LIMIT = 1e-3
"""A baseline in float32 whose logits are farther than this from PyTorch's computes something else."""
PROMPTS = (
    *PICTURE_PROMPTS,
    "Bilateral pulmonary infection, two infected areas, all left lung and lower right lung.",
    "Unilateral pulmonary infection, one infected area, lower right lung.",
    SHORTEST_PROMPT,
)
PAIRS = 4
USEFUL_FRACTIONS = (0.05, 0.95)
"""Of an image's pixels inside the mask: Dice of a smaller or larger one hardly moves, or moves with single pixels."""
NEAR_ZERO = 0.01
NOTE = (
    "near_zero_fraction is the fraction of pixels whose |logit| is below 1 % of the largest. Untrained weights have "
    "many of them, and each flips at a small error, so relative errors and Dice of low precisions are not those of a "
    "trained network."
)


@dataclass(frozen=True)
class JudgedPairs:
    """Images (N, 3, H, W), each with a prompt (N, L), and PyTorch's float32 logits for them (N, 1, H, W).

    Of two synthetic radiographs and `PROMPTS`, the pairs whose masks are nearest to half of the image.
    """

    images: Floats
    tokens: Tokens
    logits: Floats
    names: tuple[tuple[int, str], ...]

    @staticmethod
    def of(bundle: Bundle, model: CausalCLIPSeg) -> JudgedPairs:
        """Compute PyTorch's answers for every image and prompt, and choose."""
        from cclip_deploy.runtime.pytorch import PyTorchBackend

        manifest, tokenizer = bundle.manifest, bundle.tokenizer()
        prompts = [text for text in PROMPTS if len(tokenizer.ids(text)) <= manifest.prompt_length]
        films = drawn_films(manifest.image_hw)
        images = np.concatenate([to_input(pixels, manifest.image_hw, manifest.preprocessing) for pixels in films])
        tokens = np.stack([tokenizer.encode(text, manifest.prompt_length) for text in prompts])
        logits = PyTorchBackend(model).all_pairs(images, tokens)
        distance = np.abs((logits >= 0).mean(axis=(2, 3)) - 0.5)
        nearest = np.argsort(distance, axis=None, kind="stable")[:PAIRS]
        rows, columns = np.unravel_index(nearest, distance.shape)
        names = tuple((int(row), prompts[column]) for row, column in zip(rows, columns, strict=True))
        return JudgedPairs(images[rows], tokens[columns], logits[rows, columns][:, None], names)

    @property
    def mask_fractions(self) -> list[float]:
        """Of each image's pixels, the fraction inside the reference mask."""
        return [float(value) for value in (self.logits >= 0).mean(axis=(1, 2, 3))]

    def is_useful(self) -> list[bool]:
        """Whether each mask is of a size at which Dice says something."""
        low, high = USEFUL_FRACTIONS
        return [low <= fraction <= high for fraction in self.mask_fractions]

    def accuracy(self, answer: Answer, timed: BenchInputs, timed_logits: Floats) -> Accuracy:
        """Run a candidate on every pair, and on the input that is timed."""
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
        """What the JSON says of the reference."""
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
    candidates: Iterable[BenchCandidate], pairs: JudgedPairs, timed: BenchInputs, truth: Answer, left_out: LeftOut
) -> list[BenchCandidate]:
    """Compare every candidate that answers one image and one prompt with PyTorch, and note how far it is.

    A baseline is left out where its error is above its own precision's limit: one in BF16 stays, with its error.

    Args:
        candidates: those without `answer` are passed on as they are.
        pairs: what they are compared on.
        timed: the input that is timed.
        truth: PyTorch's answer.
        left_out: gets the name of every baseline that computes something else.

    Raises:
        ParityError: a candidate of the bundle breaks its precision's limit.
    """
    timed_logits = truth(timed.image, timed.prompt)
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
                f"{candidate.name} is {error:.3g} away from PyTorch, so its time means nothing. "
                f"Check the bundle: cclip-deploy verify BUNDLE --backend {candidate.backend}"
            )
        reason = f"computes something else: relative error {error:.3g} in {candidate.precision_class}"
        left_out.append({"name": candidate.name, "reason": reason})
    return found


def _is_within(candidate: BenchCandidate, accuracy: Accuracy) -> bool:
    """Whether errors are within the limits; NaN never is."""
    if candidate.role == "bundle":
        limit, timed = (limits_of(candidate.precision, name).relative_error for name in ("pictures", "seeded"))
    elif candidate.precision_class == "fp32":
        limit = timed = BASELINE_LIMIT
    else:
        limit = timed = LIMITS[candidate.precision_class].relative_error
    return accuracy.relative_error <= limit and accuracy.relative_error_timed_input <= timed
