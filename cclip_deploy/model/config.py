"""Network sizes: `rn101` as published, `tiny` for tests and the demo."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Any

from cclip_deploy.common.limits import LARGEST_IMAGE_SIDE
from cclip_deploy.errors import UsageError

STRIDE = 32
CONTEXT_LENGTH = 77
SHORTEST_PROMPT = 3
LARGEST = 65536
MOST_LAYERS = 128
"""Limit for the blocks of a stage or tower; the deepest CLIP has 36."""
LONGEST_NAME = 64


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that determine all tensor shapes of a CausalCLIPSeg network (Chen et al., MICCAI 2024)."""

    name: str
    vision_layers: tuple[int, int, int, int]
    vision_width: int
    vision_heads: int
    embed_dim: int
    grid: int
    text_width: int
    text_heads: int
    text_layers: int
    carafe_width: int
    feature_width: int
    vocabulary_size: int = 49408
    context_length: int = CONTEXT_LENGTH

    def __post_init__(self) -> None:
        values = asdict(self)
        sizes = [*self.vision_layers, *(values[name] for name in values if name not in ("name", "vision_layers"))]
        if type(self.name) is not str or not 0 < len(self.name) <= LONGEST_NAME or not self.name.isprintable():
            raise UsageError(f"A config's name must have 1 to {LONGEST_NAME} characters, not {self.name!r:.80}.")
        if len(self.vision_layers) != 4 or any(type(size) is not int or not 0 < size <= LARGEST for size in sizes):
            raise UsageError(f"Config {self.name!r} has sizes that are not integers from 1 to {LARGEST}: {values}.")
        if max(*self.vision_layers, self.text_layers) > MOST_LAYERS:
            raise UsageError(
                f"Config {self.name!r} has stages of {self.vision_layers} blocks and {self.text_layers} text layers; "
                f"the limit is {MOST_LAYERS}."
            )
        if (32 * self.vision_width) % self.vision_heads or self.text_width % self.text_heads:
            raise UsageError(
                f"Config {self.name!r} splits {32 * self.vision_width} channels on {self.vision_heads} heads and "
                f"{self.text_width} on {self.text_heads}; heads must divide channels."
            )
        if self.embed_dim != self.neck_width:
            raise UsageError(
                f"Config {self.name!r} has embed_dim {self.embed_dim} and vision_width {self.vision_width}; "
                f"the neck adds maps of both, so embed_dim must be 8 x vision_width = {self.neck_width}."
            )

    @property
    def neck_width(self) -> int:
        """Channels of stage 2, of v5 and of every map in the neck."""
        return 8 * self.vision_width

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {**asdict(self), "vision_layers": list(self.vision_layers)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """Build from the dict of `to_dict`; raise UsageError for an unknown or missing key."""
        try:
            return ModelConfig(**{**values, "vision_layers": tuple(values["vision_layers"])})
        except (TypeError, KeyError) as error:
            raise UsageError(f"Not a model config: {error}. Expected the keys of ModelConfig.") from error


RN101 = ModelConfig(
    name="rn101",
    vision_layers=(3, 4, 23, 3),
    vision_width=64,
    vision_heads=32,
    embed_dim=512,
    grid=7,
    text_width=512,
    text_heads=8,
    text_layers=12,
    carafe_width=128,
    feature_width=256,
)

TINY = ModelConfig(
    name="tiny",
    vision_layers=(1, 1, 2, 1),
    vision_width=8,
    vision_heads=4,
    embed_dim=64,
    grid=7,
    text_width=64,
    text_heads=4,
    text_layers=2,
    carafe_width=16,
    feature_width=32,
)

CONFIGS = {config.name: config for config in (RN101, TINY)}


@dataclass(frozen=True)
class InputForm:
    """Input sizes of a network that its weights do not determine: image height and width, and tokens per prompt."""

    image_hw: tuple[int, int] = (224, 224)
    prompt_length: int = 32

    def __post_init__(self) -> None:
        check_image_hw(self.image_hw)
        if not SHORTEST_PROMPT <= self.prompt_length <= CONTEXT_LENGTH:
            raise UsageError(
                f"A prompt length of {self.prompt_length} is out of range. Use {SHORTEST_PROMPT} to {CONTEXT_LENGTH}, "
                "for example 32."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {"image_hw": list(self.image_hw), "prompt_length": self.prompt_length}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> InputForm:
        """Build from the dict of `to_dict`; raise UsageError if it is invalid."""
        try:
            height, width = (int(side) for side in values["image_hw"])
            return InputForm((height, width), int(values["prompt_length"]))
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"Not an input form: {error}. Expected image_hw and prompt_length.") from error


def image_hw(text: str | int) -> tuple[int, int]:
    """Parse `--image-size`: N or HxW, both multiples of 32."""
    parts = str(text).lower().split("x")
    try:
        height, width = (int(part) for part in (parts * 2 if len(parts) == 1 else parts))
    except ValueError:
        raise UsageError(f"Image size {reprlib.repr(text)} is not N or HxW, for example 224 or 256x320.") from None
    check_image_hw((height, width))
    return height, width


def check_image_hw(hw: tuple[int, int]) -> None:
    """Raise UsageError unless both sides are positive multiples of 32, up to LARGEST_IMAGE_SIDE."""
    for side in hw:
        if side > LARGEST_IMAGE_SIDE:
            raise UsageError(
                f"Image size {hw[0]}x{hw[1]} is out of range. Use sides of {STRIDE} to {LARGEST_IMAGE_SIDE}."
            )
        if side < STRIDE or side % STRIDE:
            near = max(STRIDE, round(side / STRIDE) * STRIDE)
            raise UsageError(
                f"Image size {hw[0]}x{hw[1]}: {side} is not a positive multiple of {STRIDE}. Use {near}, for example."
            )
