"""The precision that is requested of OpenVINO, and the one that it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.runtime.openvino.arithmetic import Arithmetic, arithmetic_of, hint_for, refuse_lower
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend, describe_device
from cclip_deploy.runtime.registry import BackendConfig
from cclip_deploy.verify.verify import VerifyOptions, verify_bundle
from tests.conftest import THREADS


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
    assert arithmetic_of(mixed) == Arithmetic("bf16", {"bf16": 2, "f32": 1}, "bf16")
    assert arithmetic_of(mixed).facts() == {
        "inference_precision_hint": "bf16", "product_precisions": {"bf16": 2, "f32": 1},
    }  # fmt: skip
    assert arithmetic_of(compiled("f16", ("Convolution", "f16"), ("MatMul", "bf16"))).lowest == "bf16"


def test_the_hint_alone_is_not_the_precision() -> None:
    assert arithmetic_of(compiled("bf16", ("FullyConnected", "f32"), ("Eltwise", "bf16"))).lowest == "fp32"
    assert arithmetic_of(compiled("f32", ("Convolution", "u8"))).lowest == "int8"


def test_a_model_without_a_known_product_is_refused() -> None:
    with pytest.raises(EnvironmentIssue, match="reports no known type"):
        arithmetic_of(compiled("f32", ("Eltwise", "f32"), ("Convolution", "i4")))


@pytest.mark.parametrize(
    ("precision", "capabilities", "hint"),
    [
        ("fp16", ["BF16", "FP16", "FP32", "INT8"], "f16"),
        ("fp16", ["BF16", "FP32", "INT8"], "f32"),
        ("fp16", ["FP32"], "f32"),
        ("fp32", ["BF16", "FP16", "FP32"], "f32"),
        ("bf16", ["BF16", "FP16", "FP32"], "f32"),
        ("int8", ["BF16", "FP16", "FP32", "INT8"], "f32"),
    ],
)
def test_fp16_is_requested_only_where_the_processor_has_it(precision: str, capabilities: list[str], hint: str) -> None:
    """Where it has BF16 alone, OpenVINO takes a request for FP16 as one for BF16."""
    assert hint_for(precision, capabilities) == hint


@pytest.mark.parametrize(("precision", "ran"), [("fp16", "bf16"), ("fp32", "fp16"), ("fp32", "bf16"), ("bf16", "int8")])
def test_a_graph_in_a_lower_precision_than_its_own_is_refused(precision: str, ran: str) -> None:
    with pytest.raises(EnvironmentIssue, match=f"in {ran} on this processor, a lower precision than its {precision}"):
        refuse_lower("graphs/x.onnx", precision, Arithmetic(ran, {}, "f16"))


@pytest.mark.parametrize(
    ("precision", "ran"), [("fp16", "fp32"), ("bf16", "fp16"), ("int8", "fp32"), ("int8-fp16", "int8"), ("fp8", "fp32")]
)
def test_a_graph_in_its_own_or_a_higher_precision_is_taken(precision: str, ran: str) -> None:
    refuse_lower("graphs/x.onnx", precision, Arithmetic(ran, {}, "f32"))


def test_a_backend_whose_graphs_run_lower_than_they_are_does_not_load_them(
    low_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO did on processors with BF16: this double of a processor ignores what is requested."""
    read_back = Arithmetic("bf16", {"bf16": 3}, "bf16")
    monkeypatch.setattr("cclip_deploy.runtime.openvino.backend.arithmetic_of", lambda compiled: read_back)
    with pytest.raises(EnvironmentIssue, match=r"runs graphs/mask_decoder\.fp16\.onnx in bf16"):
        OpenVinoBackend(Bundle.open(low_bundle_path), "fp16", threads=1).load("mask_decoder")


def test_verify_says_what_the_products_of_each_graph_ran_in(low_bundle_path: Path) -> None:
    native = "fp16" if "FP16" in describe_device() else "fp32"
    found = verify_bundle(
        Bundle.open(low_bundle_path), VerifyOptions(threads=THREADS, choice=BackendConfig("openvino"))
    )
    assert [check.describe() for check in found.checks if not check.passed] == []
    ran = {row["precision"]: row["arithmetic"] for row in found.ran}
    chain = ("image_encoder", "prompt_encoder", "mask_decoder")
    assert ran == {
        "fp32": dict.fromkeys(chain, "fp32"),
        "fp16": dict.fromkeys(chain, native),
        "int8": {**dict.fromkeys(chain, "fp32"), "image_encoder": "int8"},
    }
    assert any("computes the products of" in note for note in found.notes) == (native == "fp32")
    assert not any("every result rounded" in note for note in found.notes)  # that is ONNX Runtime's way


def test_on_a_processor_with_bf16_and_without_fp16_a_sound_bundle_verifies(low_bundle_path: Path) -> None:
    """Before, its FP16 graphs ran in BF16 there, and `verify` called the bundle broken by FP16's limits.

    oneDNN is told to use no later instructions than those of such a processor; on an older one it changes nothing.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from cclip_deploy.cli.app import main; main()", "verify", low_bundle_path,
         "--backend", "openvino", "--json", "--threads", "1"],
        capture_output=True, text=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ran = {row["precision"]: set(row["arithmetic"].values()) for row in told["ran"]}
    assert ran["fp16"] == {"fp32"}
    assert any("image_encoder (fp16) in fp32" in note for note in told["notes"])
