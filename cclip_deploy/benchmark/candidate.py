"""Benchmark candidates with their role, form and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.benchmark.latency import Candidate
from cclip_deploy.bundle.precision import Precision

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
Answer = Callable[[Floats, Tokens], Floats]
"""One image (1, 3, H, W) and one prompt (1, L) -> logits (1, 1, H, W)."""

Role = Literal["bundle", "baseline", "machine"]


class Form(StrEnum):
    """What a candidate computes, in any library."""

    FUSED = "fused"
    NEW = "new prompt"
    CACHED = "cached prompt"
    PROMPT = "prompt"
    MORE = "one more prompt"
    IMAGE = "image pass"
    NEW_PROMPTS = "new prompts"
    CACHED_PROMPTS = "cached prompts"
    EAGER = "pytorch eager"
    EAGER_CAUSAL = "pytorch eager, causal path"
    COMPILED = "torch.compile"
    PLAIN = "plain export"
    PLAIN_SLIM = "plain export, onnxslim"
    CONVERTED = "ov.convert_model"
    PRODUCT = "matrix product"


class Setting(StrEnum):
    """Setting of a baseline that is timed in several settings."""

    CHANNELS_LAST = "channels last"
    OPENVINO_F32 = "OpenVINO"
    OPENVINO_DEFAULTS = "OpenVINO defaults"


@dataclass(frozen=True)
class Accuracy:
    """Error of a candidate relative to PyTorch in float32.

    `relative_error` is the largest over the compared pairs of an image and a prompt, `relative_error_timed_input` that
    of the timed input. Dice is None if no reference mask has a useful size.
    """

    relative_error: float
    relative_error_timed_input: float
    mask_dice: float | None
    mask_dice_worst: float | None


@dataclass(frozen=True, kw_only=True)
class BenchCandidate(Candidate):
    """A candidate of `bench`; figures are computed from these fields, not from the name.

    `precision` is that of the graphs or, for a baseline, of its convolutions and matrix products.
    `includes_prompt_encoding` is None without a prompt. `workload` is (images, prompts for each image).
    `multiply_adds` is the count of the graph, if there is one.
    """

    role: Role
    form: Form
    device: str
    setting: Setting | None = None
    includes_prompt_encoding: bool | None = None
    workload: tuple[int, int] = (1, 1)
    multiply_adds: int | None = None
    answer: Answer | None = None
    accuracy: Accuracy | None = None

    @property
    def precision_class(self) -> str:
        """Type of the products: fp32, fp16, bf16, int8 or fp8, which is int8 for `int8-fp16`."""
        return Precision(self.precision).product_type

    def facts(self) -> dict[str, object]:
        return {
            "role": self.role,
            "ours": self.role == "bundle",
            "form": str(self.form),
            "setting": None if self.setting is None else str(self.setting),
            "precision_class": self.precision_class,
            "includes_prompt_encoding": self.includes_prompt_encoding,
            "workload": list(self.workload),
            "device": self.device,
            "multiply_adds": self.multiply_adds,
            **(asdict(self.accuracy) if self.accuracy else {}),
            **self.extra,
        }
