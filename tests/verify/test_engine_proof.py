"""The record of an engine's build proves only that engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.verify.engine_proof import engine_checks
from tests.bundles import copy_of, reseal
from tests.cli.run import invoke
from tests.conftest import THREADS

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra: pip install 'cclip-deploy[rtx]'")

ENGINE = "engines/mask_decoder.fp16.tensorrt-rtx.engine"
RECORD = "engines/mask_decoder.fp16.tensorrt-rtx.layers.json"
OTHER_ENGINE = "engines/prompt_encoder.fp16.tensorrt-rtx.engine"


@pytest.fixture
def copy(engine_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(engine_bundle_path, tmp_path)


def change_record(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((bundle / RECORD).read_bytes())
    change(record)
    (bundle / RECORD).write_text(json.dumps(record))


def replace_engine(bundle: Path, content: bytes, with_record: bool) -> None:
    """Other bytes under the engine's name, every checksum made to fit; `with_record` forges the record's, too."""
    (bundle / ENGINE).write_bytes(content)
    if with_record:
        change_record(bundle, lambda record: record.update(engine_sha256=hashlib.sha256(content).hexdigest()))
    reseal(bundle)
    assert Bundle.open(bundle).check_all() == ()


def why_unproved(bundle: Path) -> str:
    """Why the mask decoder's engine, and no other, is not proved."""
    checks, notes = engine_checks(Bundle.open(bundle))
    assert {check.name for check in checks if not check.passed} == {"mask_decoder/engine/precision_honoured"}
    (note,) = notes
    assert note.startswith(f"{ENGINE} is not proved to run in fp16: ")
    return note


def test_engines_as_they_were_built_are_proved(engine_bundle_path: Path) -> None:
    checks, notes = engine_checks(Bundle.open(engine_bundle_path))
    assert len(checks) == 6
    assert all(check.passed for check in checks)
    assert notes == []


@pytest.mark.parametrize("content", [b"#!/bin/sh\necho pwned\n" * 3, b"", b"vtrt", b"vtrt" * 100])
@pytest.mark.parametrize("with_record", [False, True])
def test_a_file_that_is_not_an_engine_is_not_proved(copy: Path, content: bytes, with_record: bool) -> None:
    replace_engine(copy, content, with_record)
    assert ("is no" if with_record else "belongs to another engine") in why_unproved(copy)


@pytest.mark.parametrize(
    ("with_record", "said"), [(False, "belongs to another engine"), (True, "it is another engine")]
)
def test_another_graphs_engine_is_not_proved(copy: Path, with_record: bool, said: str) -> None:
    replace_engine(copy, (copy / OTHER_ENGINE).read_bytes(), with_record)
    assert said in why_unproved(copy)


def test_the_same_graphs_fp32_engine_is_not_proved_by_the_fp16_record(copy: Path) -> None:
    """Inputs and outputs are the same; the nodes of an FP16 graph are not in it."""
    build_engines(Bundle.open(copy), BuildOptions("fp32", graphs=("mask_decoder",), threads=THREADS))
    replace_engine(copy, (copy / ENGINE.replace("fp16", "fp32")).read_bytes(), with_record=True)
    assert "fp16] of its graph: it is another engine" in why_unproved(copy)


def test_half_an_engine_is_not_proved(copy: Path) -> None:
    content = (copy / ENGINE).read_bytes()
    replace_engine(copy, content[: len(content) // 2], with_record=True)
    assert f"its header gives {len(content)}" in why_unproved(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.pop("engine_sha256"), "has no hashes of its engine and graph. Build the engine again"),
        (lambda record: record.pop("graph_sha256"), "has no hashes of its engine and graph. Build the engine again"),
        (lambda record: record.update(graph_sha256="0" * 64), "belongs to another graph"),
        (lambda record: record["products"].append("node_conv2d"), "differ in their products; first: node_conv2d"),
        (lambda record: record.update(products=["node_view"]), "differ in their products"),
    ],
)
def test_a_record_that_is_not_the_engines_own_proves_nothing(
    copy: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """Records of earlier versions have no hashes: they are read, and prove nothing."""
    change_record(copy, change)
    reseal(copy)
    assert said in why_unproved(copy)


def test_verify_fails_and_says_why_an_engine_is_not_proved(copy: Path) -> None:
    replace_engine(copy, b"#!/bin/sh\necho pwned\n" * 3, with_record=True)
    done = invoke("verify", copy, "--threads", THREADS)
    assert done.exit_code == 4
    said = " ".join(done.stdout.split())
    assert "tensorrt-rtx engine of mask_decoder: built from this graph, layers in fp16: FAILED" in said
    assert "is not proved to run in fp16: the file is not a tensorrt-rtx engine: it starts with b'#!/b'" in said
