"""The precisions that graphs and engines come in, and what the part of a network that is not quantised runs in."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8-fp16", "fp8-fp16"]
"""`int8` and `fp8` leave the rest in FP32, `int8-fp16` and `fp8-fp16` in FP16."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
REST: dict[str, Precision] = {"int8": "fp32", "fp8": "fp32", "int8-fp16": "fp16", "fp8-fp16": "fp16"}
"""What a quantised network runs in where it is not quantised: the prompt encoder and the mask decoder, for one."""


def product_type(precision: str) -> str:
    """The type that convolutions and products of a graph of this precision run in, as the layer table names it."""
    return precision.split("-")[0]


def rest_type(precision: str) -> str:
    """The type of the products that are kept out of it on purpose."""
    return REST.get(precision, "fp32")


def is_quantised(precision: str) -> bool:
    """Whether graphs of this precision hold codes and scales, so that they need a calibration."""
    return precision in REST
