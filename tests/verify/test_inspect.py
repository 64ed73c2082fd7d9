"""`inspect` describes bundles with correct checksums only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.model.config import TINY
from cclip_deploy.verify.inspect import describe_bundle
from tests.bundles import copy_of, digests, flip_byte, reseal

GRAPH_KEYS = {"inputs", "outputs", "multiply_adds", "sha256", "precision", "made_from_sha256", "file", "bytes"}


def test_json_is_the_contract(tiny_bundle_path: Path) -> None:
    facts = json.loads(json.dumps(describe_bundle(tiny_bundle_path), allow_nan=False))
    assert facts.keys() == {
        "summary", "graphs", "engines", "checkpoint", "preprocessing", "created", "command", "versions",
        "files_checked", "files_without_checksum",
    }  # fmt: skip
    assert facts["graphs"].keys() == {"prompt_encoder", "image_encoder", "mask_decoder", "fused"}
    found = digests(tiny_bundle_path)
    for name, graph in facts["graphs"].items():
        assert graph.keys() == GRAPH_KEYS
        assert graph["sha256"] == found[graph["file"]]
        assert graph["bytes"] == (tiny_bundle_path / "graphs" / f"{name}.onnx").stat().st_size
        assert all(tensor.keys() == {"name", "dtype", "shape"} for tensor in (*graph["inputs"], *graph["outputs"]))
    assert facts["graphs"]["image_encoder"]["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 64, 96]}
    ]
    assert facts["graphs"]["prompt_encoder"]["inputs"] == [
        {"name": "tokens", "dtype": "int64", "shape": ["prompts", 24]}
    ]
    assert facts["engines"] == []
    assert facts["summary"] == "tiny, deploy form, 64x96, 24 tokens"
    assert facts["files_checked"] == len(found) - 1
    assert facts["files_without_checksum"] == []


def test_multiply_adds_are_of_one_picture_and_one_prompt(tiny_bundle_path: Path) -> None:
    graphs = describe_bundle(tiny_bundle_path)["graphs"]
    # The nine taps of one prompt's kernel on every pixel of every feature.
    assert graphs["mask_decoder"]["multiply_adds"] == 9 * TINY.feature_width * 64 * 96
    parts = sum(graphs[name]["multiply_adds"] for name in ("image_encoder", "prompt_encoder", "mask_decoder"))
    assert graphs["fused"]["multiply_adds"] == pytest.approx(parts, rel=0.02)


def test_engines_have_the_precision_of_their_layers(engine_bundle_path: Path) -> None:
    facts = json.loads(json.dumps(describe_bundle(engine_bundle_path), allow_nan=False))
    assert [engine["graph"] for engine in facts["engines"]] == ["image_encoder", "prompt_encoder", "mask_decoder"]
    found = digests(engine_bundle_path)
    for engine in facts["engines"]:
        assert engine["sha256"] == found[engine["file"]]
        assert engine["bytes"] == (engine_bundle_path / engine["file"]).stat().st_size
        assert engine["product_layers"].keys() <= {"fp16", "mixed"}
        assert engine["product_layers"]["fp16"] > 0
        assert sum(engine["all_layers"].values()) >= sum(engine["product_layers"].values())
        assert engine["backend_version"]
    assert facts["graphs"]["fused"]["precision"] == "fp32"
    assert facts["graphs"]["mask_decoder.fp16"]["precision"] == "fp16"


def test_files_without_checksum_are_listed(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    (copy / "notes.txt").write_text("mine")
    assert describe_bundle(copy)["files_without_checksum"] == ["notes.txt"]


def test_an_altered_bundle_is_not_described(engine_bundle_path: Path, tmp_path: Path) -> None:
    for name in ("graphs/fused.onnx", "engines/mask_decoder.fp16.tensorrt-rtx.engine"):
        copy = copy_of(engine_bundle_path, tmp_path, f"{Path(name).stem}.cclip")
        flip_byte(copy / name)
        with pytest.raises(BundleError, match=f"{name} was altered"):
            describe_bundle(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": 3}', "\x00", "[" * 100_000])
def test_an_invalid_layer_table_raises(engine_bundle_path: Path, tmp_path: Path, content: str) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    (copy / Bundle.open(copy).manifest.engines[0].layers).write_text(content)
    reseal(copy)
    with pytest.raises(Exception, match=r"(no|[Nn]ot a) layer table") as caught:
        describe_bundle(copy)
    assert getattr(caught.value, "exit_code", None) == 6
