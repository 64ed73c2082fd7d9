"""Precisions of graphs and engines."""

from __future__ import annotations

from enum import StrEnum

from cclip_deploy.errors import UsageError

NEVER_QUANTIZED = ("prompt_encoder", "mask_decoder")
"""Graphs without quantizable products: in a quantized precision they have the precision of the rest."""


class Precision(StrEnum):
    """The precision of a network: of its convolutions and matrix products and, after a hyphen, of the rest.

    In `int8` and `fp8`, what is not quantized is FP32; in `int8-fp16` and `fp8-fp16` it is FP16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT8_FP16 = "int8-fp16"
    FP8_FP16 = "fp8-fp16"

    @property
    def product_type(self) -> str:
        """Type of the convolutions and matrix products: `int8` for `int8-fp16`."""
        return self.split("-")[0]

    @property
    def is_quantized(self) -> bool:
        """Whether graphs of this precision hold quantized values and scales, so that they need calibration."""
        return self.product_type in ("int8", "fp8")

    @property
    def rest(self) -> Precision:
        """Precision of graphs and operators that are not quantized; the precision itself if nothing is."""
        if not self.is_quantized:
            return self
        return Precision.FP16 if self.endswith("-fp16") else Precision.FP32

    @property
    def high_precision(self) -> Precision:
        """Precision of the products that are kept in a higher precision than `product_type`."""
        return self.rest if self.is_quantized else Precision.FP32

    @property
    def has_16_bits(self) -> bool:
        """Whether anything is computed in FP16 or BF16."""
        return self.rest in (Precision.FP16, Precision.BF16)

    def of_graph(self, graph: str) -> Precision:
        """Precision of a graph in a network of this precision."""
        return self.rest if graph in NEVER_QUANTIZED else self

    def build_command(self, *options: str) -> str:
        """Return the command that adds graphs and engines of this precision to a bundle."""
        flags = [f"--{part}" for part in self.split("-")]
        data = ["--calibration DATA"] if self.is_quantized else []
        return " ".join(["cclip-deploy build-engine BUNDLE", *flags, *data, *options])


def parse_precision(name: str) -> Precision:
    """Return the precision of a name; raise UsageError if there is none."""
    try:
        return Precision(name)
    except ValueError:
        raise UsageError(f"There is no precision {name!r}. Use one of {', '.join(Precision)}.") from None
