"""`verify` passes exported bundles, and fails for wrong outputs and unproved engines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.engines.build import BuildOptions, build_engines
from cclip_deploy.errors import BundleError, ImageError, PromptError, UsageError
from cclip_deploy.model.checkpoint import save_checkpoint
from cclip_deploy.verify.verify import Verification, VerifyOptions, verify_bundle
from tests.bundles import change_weights, copy_of, digests, flip_byte, reseal, store_all_weights
from tests.conftest import THREADS, random_network
from tests.made_bundles import add_precisions

pytestmark = pytest.mark.slow

OPTIONS = VerifyOptions(threads=THREADS)


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle_path, tmp_path)


def verify(path: Path, options: VerifyOptions = OPTIONS) -> Verification:
    return verify_bundle(Bundle.open(path), options)


def failed(found: Verification) -> set[str]:
    return {check.name for check in found.checks if not check.passed}


def test_an_untouched_bundle_passes_on_every_graph_with_both_references(tiny_bundle_path: Path) -> None:
    before = digests(tiny_bundle_path)
    found = verify(tiny_bundle_path)
    assert found.passed
    assert found.notes == ()
    logits = [
        f"{graph}/{inputs}/logits" for graph in ("fused", "mask_decoder", "chain") for inputs in ("seeded", "pictures")
    ]
    metrics = {name: {c.metric for c in found.checks if c.name == name} for name in logits}
    assert all(each >= {"relative_error", "max_error", "mask_dice", "flipped_share"} for each in metrics.values())
    assert {check.graph for check in found.checks} == {
        "tokenizer", "preprocessing", "threshold", "image_encoder", "prompt_encoder", "mask_decoder", "fused", "chain",
    }  # fmt: skip
    assert digests(tiny_bundle_path) == before


def test_json_is_the_contract(tiny_bundle_path: Path) -> None:
    told = json.loads(json.dumps(verify(tiny_bundle_path).to_dict(), allow_nan=False))
    assert told.keys() == {"passed", "checks", "notes", "ran", "not_verified"}
    assert told["passed"] is True
    assert told["not_verified"] == []
    (ran,) = told["ran"]
    assert ran["graphs"] == dict.fromkeys(("image_encoder", "prompt_encoder", "mask_decoder", "fused"), "fp32")
    for check in told["checks"]:
        assert check.keys() == {"name", "graph", "backend", "precision", "metric", "value", "limit", "passed", "detail"}
        stage = check["graph"] in ("tokenizer", "preprocessing", "threshold")
        assert (check["backend"], check["precision"]) == (("bundle", "all") if stage else ("onnxruntime", "fp32"))
        assert check["detail"] is None


@pytest.mark.parametrize("graph", ["image_encoder", "prompt_encoder", "fused"])
def test_a_slightly_altered_weight_fails_with_correct_checksums(copy: Path, graph: str) -> None:
    store_all_weights(copy)
    change_weights(copy / "graphs" / f"{graph}.onnx", lambda weights: weights * np.float32(1.01))
    reseal(copy)
    assert Bundle.open(copy).check_all() == ()
    found = verify(copy)
    assert not found.passed
    assert found.to_dict()["passed"] is False
    chain = set() if graph == "fused" else {"chain"}
    assert {name.split("/")[0] for name in failed(found)} == {graph} | chain


def test_a_network_that_gives_nan_fails_and_its_json_is_valid(copy: Path) -> None:
    def poison(weights: np.ndarray) -> np.ndarray:
        weights.flat[0] = np.nan
        return np.full_like(weights, np.nan)

    store_all_weights(copy)
    change_weights(copy / "graphs" / "image_encoder.onnx", poison)
    reseal(copy)
    found = verify(copy)
    assert not found.passed
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    wrong = [check for check in told["checks"] if check["value"] is None]
    assert wrong
    assert not any(check["passed"] for check in wrong)


def test_a_changed_byte_stops_before_anything_is_computed(copy: Path) -> None:
    flip_byte(copy / "graphs" / "fused.onnx")
    said: list[str] = []
    with pytest.raises(BundleError, match=r"fused\.onnx was altered"):
        verify_bundle(Bundle.open(copy), OPTIONS, said.append)
    assert said == ["Checking checksums"]


def test_a_stray_file_and_useless_masks_are_noted(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    path = copy / "reference" / "pictures.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["logits"] = np.abs(arrays["logits"]) + 1
    np.savez_compressed(path, **arrays)
    stray = (copy / "notes.txt").read_bytes()
    (copy / "notes.txt").unlink()
    reseal(copy)
    (copy / "notes.txt").write_bytes(stray)
    notes = verify(copy).notes
    assert any("notes.txt have no checksum" in note for note in notes)
    assert any(note.startswith("No mask of the reference pictures covers between 2 % and 98 %") for note in notes)
    assert not any("seeded" in note for note in notes)


def test_a_bundle_without_references_raises(copy: Path) -> None:
    reseal(copy, lambda manifest: manifest.update(references=[]))
    with pytest.raises(BundleError, match="has no references"):
        verify(copy)


def test_a_verification_without_checks_has_not_passed() -> None:
    assert not Verification((), ()).passed


def test_a_checkpoint_computes_references_for_given_images_and_prompts(
    tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    options = VerifyOptions(tiny_checkpoint, (tmp_path,), ("left lung",), threads=THREADS)
    found = verify(tiny_bundle_path, options)
    assert found.passed
    assert not any("is not the file" in note for note in found.notes)
    assert "fused/pictures/logits" in {check.name for check in found.checks}


def test_another_checkpoint_of_the_same_config_is_noted_and_fails(tiny_bundle_path: Path, tmp_path: Path) -> None:
    save_checkpoint(random_network(seed=1), tmp_path / "other.safetensors")
    found = verify(tiny_bundle_path, VerifyOptions(tmp_path / "other.safetensors", threads=THREADS))
    assert not found.passed
    assert any("is not the file that this bundle was exported from" in note for note in found.notes)
    assert {"fused/seeded/logits", "chain/seeded/logits", "prompt_encoder/seeded/kernel"} <= failed(found)
    assert "mask_decoder/seeded/logits" not in failed(found)  # it has no weights


def test_a_checkpoint_of_another_config_is_refused(copy: Path, tiny_checkpoint: Path) -> None:
    reseal(copy, lambda manifest: manifest["model"].update(name="rn101", vision_width=64))
    with pytest.raises(UsageError, match="is a 'tiny' network, the bundle has 'rn101'"):
        verify(copy, VerifyOptions(tiny_checkpoint, threads=THREADS))


def test_given_images_and_prompts_need_a_checkpoint(tiny_bundle_path: Path) -> None:
    for options in (VerifyOptions(pictures=(Path("a.png"),)), VerifyOptions(prompts=("lung",))):
        with pytest.raises(UsageError, match="give --checkpoint FILE"):
            verify(tiny_bundle_path, options)


@pytest.mark.parametrize(
    ("pictures", "prompts", "error"),
    [((), ("lung " * 40,), PromptError), ((), (" ",), PromptError), ((Path("/nowhere.png"),), (), ImageError)],
)
def test_a_prompt_or_picture_that_cannot_be_used_is_an_error(
    pictures: tuple[Path, ...],
    prompts: tuple[str, ...],
    error: type[Exception],
    tiny_bundle_path: Path,
    tiny_checkpoint: Path,
) -> None:
    with pytest.raises(error):
        verify(tiny_bundle_path, VerifyOptions(tiny_checkpoint, pictures, prompts, threads=THREADS))


def test_fp16_graphs_and_engines_are_covered_and_pass(engine_bundle_path: Path) -> None:
    found = verify(engine_bundle_path)
    assert found.passed
    half = [check for check in found.checks if check.precision == "fp16"]
    assert {check.graph for check in half if check.backend == "onnxruntime"} == {
        "image_encoder", "prompt_encoder", "mask_decoder", "chain",
    }  # fmt: skip
    engines = [check for check in half if check.backend == "tensorrt-rtx"]
    assert {(check.graph, check.metric) for check in engines} == {
        (graph, metric)
        for graph in ("image_encoder", "prompt_encoder", "mask_decoder")
        for metric in ("precision_honoured", "graph_unchanged")
    }
    assert sum("not run: that needs a GPU" in note for note in found.notes) == 3


LAYERS = "engines/mask_decoder.fp16.tensorrt-rtx.layers.json"


@pytest.mark.parametrize("name", [LAYERS, LAYERS.replace("layers.json", "engine")])
def test_a_changed_byte_of_an_engine_or_its_layers_is_refused(
    engine_bundle_path: Path, tmp_path: Path, name: str
) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    flip_byte(copy / name)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        verify(copy)


def test_an_fp32_engines_layers_do_not_pass_for_fp16(engine_bundle_path: Path, tmp_path: Path) -> None:
    """A forger puts an FP32 engine and its table in the FP16 one's place and seals the bundle again."""
    copy = copy_of(engine_bundle_path, tmp_path)
    build_engines(Bundle.open(copy), BuildOptions("fp32", graphs=("mask_decoder",), threads=THREADS))
    for kind in ("engine", "layers.json"):
        honest = copy / f"engines/mask_decoder.fp32.tensorrt-rtx.{kind}"
        (copy / f"engines/mask_decoder.fp16.tensorrt-rtx.{kind}").write_bytes(honest.read_bytes())
    reseal(copy)
    assert Bundle.open(copy).check_all() == ()
    found = verify(copy)
    assert not found.passed
    assert failed(found) == {"mask_decoder/engine/precision_honoured"}
    assert {check.precision for check in found.checks if not check.passed} == {"fp16"}


def test_a_layer_table_whose_types_were_rewritten_fails(engine_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    (copy / LAYERS).write_text((copy / LAYERS).read_text().replace('"fp16"', '"fp32"'))
    reseal(copy)
    assert failed(verify(copy)) == {"mask_decoder/engine/precision_honoured"}


def test_an_engine_of_another_graph_fails(engine_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    reseal(copy, lambda manifest: manifest["engines"][2].update(graph_sha256="0" * 64))
    assert failed(verify(copy)) == {"mask_decoder/engine/graph_unchanged"}


Proof = dict[str, Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: proof.pop("products"),
        lambda proof: proof.pop("layers"),
        lambda proof: proof.update(products=3),
        lambda proof: proof["layers"][0].pop("kind"),
        lambda proof: proof["layers"][0].update(inputs=[3]),
    ],
)
def test_an_invalid_layer_table_raises(
    change: Callable[[Proof], object], engine_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    proof = json.loads((copy / LAYERS).read_text())
    change(proof)
    (copy / LAYERS).write_text(json.dumps(proof))
    reseal(copy)
    with pytest.raises(Exception, match=r"[Nn]ot? a? ?layer table|no layer table") as caught:
        verify(copy)
    assert getattr(caught.value, "exit_code", None) == 6


def test_a_proof_of_no_products_proves_nothing(engine_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(engine_bundle_path, tmp_path)
    proof = json.loads((copy / LAYERS).read_text())
    (copy / LAYERS).write_text(json.dumps({**proof, "products": []}))
    reseal(copy)
    assert failed(verify(copy)) == {"mask_decoder/engine/precision_honoured"}


def strip_sources(copy: Path) -> None:
    """Make a bundle's references as they were before they began with sentences and raw pictures."""
    for path in (copy / "reference").iterdir():
        with np.load(path) as file:
            arrays = {name: value for name, value in file.items() if not name.startswith("source/")}
        path.unlink()
        np.savez_compressed(path, **arrays)
    reseal(copy)


def test_a_bundle_with_references_of_the_old_form_passes_with_a_note(copy: Path) -> None:
    strip_sources(copy)
    found = verify(copy)
    assert found.passed
    assert len(found.notes) == 1
    assert "tokenizer, preprocessing and threshold were not checked. Export it again" in found.notes[0]


def test_a_checkpoint_brings_its_own_preprocessing_and_threshold(copy: Path, tiny_checkpoint: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["preprocessing"].update(std=[0.229, 0.224, 0.225], resize_filter="bilinear")
        told["threshold"] = 0.45

    strip_sources(copy)
    reseal(copy, change)
    assert verify(copy).passed  # its references know no better
    found = verify(copy, VerifyOptions(tiny_checkpoint, threads=THREADS))
    assert {"preprocessing/std", "preprocessing/resize_filter", "threshold/value"} <= failed(found)
    assert "preprocessing/mean" not in failed(found)
    assert not any(name.startswith("fused") for name in failed(found))  # the graphs are as they were


def test_a_checkpoint_brings_open_clips_tokenizer(copy: Path, tiny_checkpoint: Path) -> None:
    strip_sources(copy)
    told = json.loads((copy / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words["left</w>"], words["right</w>"] = words["right</w>"], words["left</w>"]
    (copy / "tokenizer.json").write_text(json.dumps(told))
    reseal(copy)
    assert verify(copy).passed
    found = verify(copy, VerifyOptions(tiny_checkpoint, threads=THREADS))
    assert {"tokenizer/ids", "tokenizer/vocabulary", "tokenizer/fields"} <= failed(found)
    details = {check.name: check.detail for check in found.checks}
    assert str(details["tokenizer/fields"]).startswith("model.vocab of tokenizer.json differs from open_clip's")
    told = str(details["tokenizer/ids"])
    assert re.search(r"^sentence '.*(left|right).*' has ids \d.* from token \d+ on, expected \d", told)
    left, right = words["right</w>"], words["left</w>"]  # as open_clip has them
    assert {f"has ids {left} ", f"has ids {right} "} & {found.group() for found in re.finditer(r"has ids \d+ ", told)}


def test_without_onnx_a_note_says_that_graphs_were_not_converted_again(
    low_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cclip_deploy.verify import derivation

    monkeypatch.setattr(derivation.importlib.util, "find_spec", lambda name: None)
    found = verify(low_bundle_path)
    assert any("converting FP32 again" in note for note in found.notes)
    assert not any("derivation" in check.name for check in found.checks)


@pytest.mark.parametrize("keep", [(), ("tower.conv2", "neck")])
def test_unrecorded_high_precision_nodes_are_read_from_the_graph_with_a_note(
    keep: tuple[str, ...], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    add_precisions(copy, ("fp16", "int8", "int8-fp16"), keep)
    kept = Bundle.open(copy).graph("image_encoder.int8").high_precision_nodes
    assert kept is not None
    assert bool(kept) == bool(keep)
    assert verify(copy).passed
    reseal(copy, lambda told: [entry.update(high_precision_nodes=None) for entry in told["graphs"].values()])
    found = verify(copy)
    assert found.passed
    assert any("does not record which products" in note for note in found.notes)


def test_float16_inputs_and_outputs_are_converted_again_too(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    add_precisions(copy, ("fp16",), io="fp16")
    assert Bundle.open(copy).graph("image_encoder.fp16").inputs[0].dtype == "float16"
    assert verify(copy).passed
