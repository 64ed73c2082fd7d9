"""What OpenVINO ran in is read from what it compiled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cclip_deploy.errors import UsageError
from cclip_deploy.pipeline.peers import precision_that_runs


def compiled(hint: str, *layers: tuple[str, str]) -> Any:
    """A compiled model with layers of these kinds and precisions."""

    def layer(kind: str, precision: str) -> Any:
        facts = {"layerType": kind, "runtimePrecision": precision}
        values = {key: SimpleNamespace(astype=lambda _, value=value: value) for key, value in facts.items()}
        return SimpleNamespace(get_rt_info=lambda: values)

    graph = SimpleNamespace(get_ordered_ops=lambda: [layer(*row) for row in layers])
    hinted = SimpleNamespace(to_string=lambda: hint)
    return SimpleNamespace(get_runtime_model=lambda: graph, get_property=lambda _: hinted)


def test_the_lowest_precision_of_any_product_counts() -> None:
    mixed = compiled("bf16", ("Convolution", "bf16"), ("MatMul", "f32"), ("Convolution", "bf16"), ("Reorder", "f16"))
    assert precision_that_runs(mixed) == (
        "bf16",
        {"inference_precision_hint": "bf16", "product_precisions": {"bf16": 2, "f32": 1}},
    )


def test_a_hint_alone_is_no_precision() -> None:
    assert precision_that_runs(compiled("bf16", ("FullyConnected", "f32"), ("Eltwise", "bf16")))[0] == "fp32"
    assert precision_that_runs(compiled("f32", ("Convolution", "u8")))[0] == "int8"


def test_a_model_without_a_known_product_is_refused() -> None:
    with pytest.raises(UsageError, match="names no precision"):
        precision_that_runs(compiled("f32", ("Eltwise", "f32"), ("Convolution", "i4")))
