"""Inference precision in OpenVINO: what is requested, and what a compiled graph uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue

PRODUCT_LAYERS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
OPENVINO_PRECISIONS = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}
"""Precisions by OpenVINO's name of the type, lowest first."""
LOWEST_FIRST = ("int8", "fp8", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Arithmetic:
    """Types of the convolutions and matrix products in a compiled graph.

    Attributes:
        lowest: the lowest precision of them.
        products: their number by OpenVINO's name of the type.
        hint: OpenVINO's inference precision hint.
    """

    lowest: str
    products: Mapping[str, int]
    hint: str

    def facts(self) -> dict[str, object]:
        """Return the JSON form of `bench --json`."""
        return {"inference_precision_hint": self.hint, "product_precisions": dict(self.products)}


def hint_for(precision: str, capabilities: list[str]) -> str:
    """Return the inference precision to request for a graph on a processor with these capabilities.

    FP16 graphs run in FP16 if the processor has it, else in FP32: BF16 would keep 8 bits of the mantissa instead of 11.
    Graphs of other precisions are FP32 wherever the graph does not set the type.
    """
    return "f16" if precision == "fp16" and "FP16" in capabilities else "f32"


def arithmetic_of(compiled: Any) -> Arithmetic:
    """Return the types of the products, read from the layers of the compiled graph; the hint is only a request.

    Raises:
        EnvironmentIssue: no product has a known type.
    """
    counts: Counter[str] = Counter()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(layer.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision")}
        if facts["layerType"] in PRODUCT_LAYERS:
            counts[facts["runtimePrecision"]] += 1
    hint = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    lowest = next((precision for name, precision in OPENVINO_PRECISIONS.items() if counts[name]), None)
    if lowest is None:
        raise EnvironmentIssue(
            f"OpenVINO reports no known type of a convolution or product: {dict(counts)}. Use --backend onnxruntime."
        )
    return Arithmetic(lowest, dict(counts), hint)


def refuse_lower(graph: str, precision: str, ran: Arithmetic) -> None:
    """Raise EnvironmentIssue if products of a graph run in a lower precision than the graph's."""
    if LOWEST_FIRST.index(ran.lowest) < LOWEST_FIRST.index(Precision(precision).product_type):
        raise EnvironmentIssue(
            f"OpenVINO runs {graph} in {ran.lowest} on this processor, a lower precision than its {precision}. "
            "Use --backend onnxruntime, or a bundle with graphs of that precision."
        )
