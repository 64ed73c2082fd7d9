"""A benchmark candidate with its role, its precision class and whether its time includes encoding the prompt."""

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
    """What is run, whichever library runs it."""

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
    """How a baseline is set up, where it is measured in more ways than one."""

    CHANNELS_LAST = "channels last"
    OPENVINO_F32 = "OpenVINO"
    OPENVINO_DEFAULTS = "OpenVINO defaults"


@dataclass(frozen=True)
class Accuracy:
    """How far a candidate's logits are from PyTorch's float32 ones, and how much of the masks it keeps.

    `relative_error` is the largest of the compared pairs of an image and a prompt, `relative_error_timed_input` that of
    the input that is timed. Dice is None where no reference mask has a useful size.
    """

    relative_error: float
    relative_error_timed_input: float
    mask_dice: float | None
    mask_dice_worst: float | None


@dataclass(frozen=True, kw_only=True)
class BenchCandidate(Candidate):
    """A candidate of `bench`; figures are computed from these fields, never from its name.

    `precision` is that of its graphs or, for a baseline, what its convolutions and matrix products run in.
    `includes_prompt_encoding` is None where no prompt is involved. `workload` is (images, prompts on each).
    `multiply_adds` are counted in the graph, where there is one.
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
        """fp32, fp16, bf16, int8 or fp8: `int8-fp16` is of the class int8."""
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
