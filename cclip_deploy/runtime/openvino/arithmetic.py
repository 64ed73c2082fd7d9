"""The arithmetic of graphs in OpenVINO: what is requested for a precision, and what a compiled graph runs in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cclip_deploy.bundle.precision import Precision
from cclip_deploy.errors import EnvironmentIssue

PRODUCT_LAYERS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
OPENVINO_PRECISIONS = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}
"""OpenVINO's types of arithmetic and ours, the lowest first."""
LOWEST_FIRST = ("int8", "fp8", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Arithmetic:
    """What the convolutions and matrix products of a compiled graph run in.

    Attributes:
        lowest: the lowest precision of any of them.
        products: how many run in each of OpenVINO's types.
        hint: what OpenVINO says that it was set to.
    """

    lowest: str
    products: Mapping[str, int]
    hint: str

    def facts(self) -> dict[str, object]:
        """The form of `bench --json`."""
        return {"inference_precision_hint": self.hint, "product_precisions": dict(self.products)}


def hint_for(precision: str, capabilities: list[str]) -> str:
    """The type to request for a graph of a precision on a processor with these capabilities.

    A processor with BF16 and without FP16 would run FP16 graphs in BF16, which keeps 8 bits where FP16 keeps 11. They
    run in FP32 there, and on processors that have neither. Whatever is not FP16 in a graph of another precision is
    FP32, or has its type written into the graph.
    """
    return "f16" if precision == "fp16" and "FP16" in capabilities else "f32"


def arithmetic_of(compiled: Any) -> Arithmetic:
    """Read from the executed graph, whose layers name their kernels' precision, because the hint alone is a request.

    Raises:
        EnvironmentIssue: no product has a known precision.
    """
    counts: Counter[str] = Counter()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(layer.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision")}
        if facts["layerType"] in PRODUCT_LAYERS:
            counts[facts["runtimePrecision"]] += 1
    hint = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    lowest = next((ours for theirs, ours in OPENVINO_PRECISIONS.items() if counts[theirs]), None)
    if lowest is None:
        raise EnvironmentIssue(
            f"OpenVINO names no precision of a convolution or product, only {dict(counts)}. Use --backend onnxruntime."
        )
    return Arithmetic(lowest, dict(counts), hint)


def refuse_lower(graph: str, precision: str, ran: Arithmetic) -> None:
    """EnvironmentIssue where products of a graph run in a lower precision than the graph's."""
    if LOWEST_FIRST.index(ran.lowest) < LOWEST_FIRST.index(Precision(precision).product_type):
        raise EnvironmentIssue(
            f"OpenVINO runs {graph} in {ran.lowest} on this processor, a lower precision than its {precision}. "
            "Use --backend onnxruntime, or a bundle with graphs of that precision."
        )
