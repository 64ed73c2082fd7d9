"""How far the masks of a lower precision are from FP32's, on pictures that nothing was fitted to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cclip_deploy.bundle import Bundle
from cclip_deploy.data.images import find_pictures, read_picture
from cclip_deploy.data.layouts import read_flat
from cclip_deploy.errors import ParityError
from cclip_deploy.evidence.parity import mask_dices
from cclip_deploy.evidence.reference import PICTURE_PROMPTS
from cclip_deploy.runtime.onnx_runtime import OnnxRuntimeBackend
from cclip_deploy.segmenter import Segmenter

LEAST_MEAN_DICE, LEAST_DICE = 0.99, 0.95
"""What masks of a quantised network are held to on an evaluation set: the mean, and the worst picture's mean."""
MOST_PICTURES = 64


@dataclass(frozen=True)
class MaskAgreement:
    """Dice of a precision's masks to FP32's. `worst` is of the worst picture, a mean over its prompts."""

    precision: str
    pictures: int
    masks: int
    mean: float
    worst: float
    worst_mask: float
    worst_picture: str

    def to_dict(self) -> dict[str, object]:
        """Plain JSON form."""
        return asdict(self)


def measure_masks(
    bundle: Bundle, precision: str, pictures: Sequence[tuple[Path, Sequence[str]]], threads: int | None = None
) -> MaskAgreement:
    """Compare the masks of a deploy bundle in a precision with those of its FP32 graphs, picture by picture.

    Args:
        bundle: holds the chain of graphs in both precisions.
        precision: what is compared with FP32.
        pictures: each with its prompts.
        threads: of ONNX Runtime on the CPU.
    """
    full, low = (
        Segmenter(bundle, OnnxRuntimeBackend(bundle, kind, "cpu", threads, rounds_as_written=True))
        for kind in ("fp32", precision)
    )
    dices: dict[str, list[float]] = {}
    for path, prompts in pictures:
        pixels = read_picture(path).pixels
        logits = [s.decode(s.encode_image(pixels), s.encode_prompts(prompts)) for s in (low, full)]
        dices[path.name] = mask_dices(*logits).ravel().tolist()
    means = {name: float(np.mean(values)) for name, values in dices.items()}
    worst = min(means, key=means.__getitem__)
    every = [value for values in dices.values() for value in values]
    return MaskAgreement(precision, len(dices), len(every), float(np.mean(every)), means[worst], min(every), worst)


def write_agreement(found: MaskAgreement, folder: Path) -> None:
    """Write what was measured into a bundle that is being made."""
    path = folder / report_name(found.precision)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


def report_name(precision: str) -> str:
    """Where a bundle keeps how far a precision's masks are from FP32's."""
    return f"reports/{precision}.masks.json"


def evaluation_pictures(paths: Sequence[Path]) -> list[tuple[Path, tuple[str, ...]]]:
    """Pictures with prompts: a data-set folder's test split with its own, others with the reference prompts."""
    found: dict[Path, tuple[str, ...]] = {}
    for path in paths:
        if path.is_dir() and any(path.glob("*.csv")):
            referrals = read_flat(path)
            splits = {referral.split for referral in referrals}
            for referral in referrals:
                if referral.split == "test" or len(splits) == 1:
                    found[referral.image] = (*found.get(referral.image, ()), referral.text)
        else:
            found |= dict.fromkeys(find_pictures([path]), PICTURE_PROMPTS)
    return list(found.items())[:MOST_PICTURES]


def hold_masks_to_fp32(
    bundle: Bundle, precision: str, evaluation_set: Sequence[Path], threads: int | None = None
) -> MaskAgreement:
    """Measure on an evaluation set; ParityError where the masks stray from FP32's by more than is allowed."""
    found = measure_masks(bundle, precision, evaluation_pictures(evaluation_set), threads)
    if not (found.mean >= LEAST_MEAN_DICE and found.worst >= LEAST_DICE):
        raise ParityError(
            f"{precision} masks stray from FP32's on the evaluation set: mean Dice {found.mean:.4f} (at least "
            f"{LEAST_MEAN_DICE}), worst picture {found.worst:.4f} ({found.worst_picture}; at least {LEAST_DICE}). Keep "
            "sensitive blocks in a higher precision (--keep), or calibrate with more or other pictures. Nothing was "
            "published."
        )
    return found
