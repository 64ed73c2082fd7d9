"""Quantize tensors that are never negative to unsigned INT8 in OpenVINO models.

INT8 graphs use signed values with zero point 0, as TensorRT requires, so tensors that are never negative use only half
of the values. CPUs multiply unsigned activations by signed weights without extra cost, so the same range is divided
into 255 steps there, which halves the rounding error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax"})
_AS_ITS_INPUT = frozenset(
    {"AvgPool", "Convert", "FakeQuantize", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
_AS_ALL_INPUTS = frozenset({"Add", "Concat", "Multiply"})
_SIGNED_CODES, _LARGEST_CODE = (-128.0, 127.0), 127.0


def use_all_bits(model: Any) -> int:
    """Replace signed quantization of float32 tensors that are never negative; return the number of changes.

    Pairs whose quantized values have other consumers, such as a concatenation, are not changed.
    """
    from openvino import opset13

    never_negative: set[str] = set()
    changed = 0
    for node in model.get_ordered_ops():
        if _is_never_negative(node, never_negative):
            never_negative.add(node.get_name())
            scaled = _dequantization_of(node) if node.get_type_name() == "FakeQuantize" else None
            if scaled is None:
                continue
            low, high = np.float32(0), np.float32(_scale_of(scaled) * _LARGEST_CODE)
            pair = opset13.fake_quantize(node.input_value(0), low, high, low, high, levels=256)
            pair.set_friendly_name(scaled.get_friendly_name())
            for reader in scaled.output(0).get_target_inputs():
                reader.replace_source_output(pair.output(0))
            never_negative.add(pair.get_name())
            changed += 1
    return changed


def _is_never_negative(node: Any, known: set[str]) -> bool:
    """Return whether a node has no negative values, given the names of such nodes before it."""
    kind = node.get_type_name()
    sources = [value.get_node() for value in node.input_values()]
    if kind in _AS_ITS_INPUT:
        return sources[0].get_name() in known
    if kind in _AS_ALL_INPUTS:
        return all(source.get_name() in known or _is_positive_constant(source) for source in sources)
    return kind in _NEVER_NEGATIVE


def _is_positive_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" and bool((node.get_data() >= 0).all())


def _dequantization_of(codes: Any) -> Any | None:
    """Return the multiplication by the scale that follows a signed FakeQuantize and has no sibling; else None."""
    lowest, highest = (value.get_node() for value in codes.input_values()[3:])
    if codes.get_levels() != 256 or codes.get_output_element_type(0).to_dtype() != np.float32:
        return None
    if tuple(_single(node) for node in (lowest, highest)) != _SIGNED_CODES:
        return None
    node = codes
    for kinds in ({"Convert"}, {"Convert"}, {"Subtract", "Multiply"}, {"Multiply"}):
        if node.get_type_name() == "Multiply":
            break
        readers = list(node.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() not in kinds:
            return None
        node = readers[0].get_node()
        if node.get_type_name() == "Subtract" and _constant_behind(node.input_value(1).get_node()) != 0:
            return None
    return node if _single(node.input_value(1).get_node()) is not None else None


def _scale_of(scaled: Any) -> float:
    return float(scaled.input_value(1).get_node().get_data().item())


def _constant_behind(node: Any) -> float | None:
    """Return the value of a scalar constant, possibly behind a conversion."""
    return _single(node.input_value(0).get_node() if node.get_type_name() == "Convert" else node)


def _single(node: Any) -> float | None:
    """Return the value of a scalar constant; None for other nodes."""
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().item())
