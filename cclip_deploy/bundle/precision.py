"""The precisions of graphs and engines, and what the part of a network that is not quantized runs in."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8-fp16", "fp8-fp16"]
"""`int8` and `fp8` leave the rest in FP32, `int8-fp16` and `fp8-fp16` in FP16."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
REST: dict[str, Precision] = {"int8": "fp32", "fp8": "fp32", "int8-fp16": "fp16", "fp8-fp16": "fp16"}
"""What a quantized network runs in where it is not quantized."""
NEVER_QUANTIZED = ("prompt_encoder", "mask_decoder")
"""Graphs of which nothing can be quantized: in a quantized precision they come in that of the rest."""


def product_type(precision: str) -> str:
    """The type that convolutions and products of a graph of this precision run in, as the layer table names it."""
    return precision.split("-")[0]


def precision_of(graph: str, precision: str) -> str:
    """The precision that a graph has in a network of `precision`: another one only where nothing can be quantized."""
    return REST.get(precision, precision) if graph in NEVER_QUANTIZED else precision


def build_command(precision: str, *options: str) -> str:
    """The command that adds a precision's graphs and engines to a bundle."""
    flags = [f"--{part}" for part in precision.split("-")]
    data = ["--calibration DATA"] if is_quantized(precision) else []
    return " ".join(["cclip-deploy build-engine BUNDLE", *flags, *data, *options])


def rest_type(precision: str) -> str:
    """The type of the products that are kept out of it on purpose."""
    return REST.get(precision, "fp32")


def is_quantized(precision: str) -> bool:
    """Whether graphs of this precision hold codes and scales, so that they need a calibration."""
    return precision in REST
