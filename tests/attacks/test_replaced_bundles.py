"""If a bundle or one of its files is replaced while it is open, results are those of the old bundle, or an error.

Before, a path was hashed and opened again later: 13 of 32 exchanged graphs and the tokenizer were used, a served bundle
gave the masks of another without a word, the other's prompt kernels were kept under the first one's hash, and 1 of 93
readers got the manifest of one bundle with the checksums of the next.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cclip_deploy.bundle.bundle import Bundle, edited_bundle, write_manifest
from cclip_deploy.errors import BundleError, UsageError
from cclip_deploy.inference.prompt_cache import PromptKernels
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.parity.reference import load_references
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend, load_openvino
from tests.bundles import change_weights, linked_copy, replace_text, reseal

GRAPHS = ("prompt_encoder", "image_encoder", "mask_decoder")
PIXELS = np.random.default_rng(0).random((50, 70), np.float32)
PROMPTS = ["left lung", "lower right lung"]
REPLACED = "was replaced or changed since it was opened. Open it again"


@pytest.fixture(scope="session")
def other_bundle(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle of the same form whose graphs compute something else, and which has another tokenizer."""
    other = linked_copy(tiny_bundle_path, tmp_path_factory.mktemp("other"))
    for name in GRAPHS:
        path = other / "graphs" / f"{name}.onnx"
        model = onnx.load(path)
        path.unlink()
        model.producer_name = "somebody else"
        onnx.save(model, path)
        if name != "mask_decoder":  # it has no weights
            change_weights(path, lambda values: values * np.float32(1.5))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["left</w>"], words["right</w>"] = words["right</w>"], words["left</w>"]
    replace_text(other / "tokenizer.json", json.dumps(tokenizer))
    reseal(other)
    return other


@pytest.fixture
def served(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """The bundle that is opened."""
    return linked_copy(tiny_bundle_path, tmp_path, "served.cclip")


def put_in_place(other: Path, served: Path) -> None:
    """Replace a bundle by another, by two renames as `whole_folder` does."""
    new = linked_copy(other, served.parent, "new")
    served.rename(served.parent / "old")
    new.rename(served)
    shutil.rmtree(served.parent / "old")


def exchange(other: Path, served: Path, name: str) -> None:
    """Put one file of another bundle in the place of the served one's."""
    (served / name).unlink()
    shutil.copyfile(other / name, served / name)


def before_opening(
    monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object], after: Callable[[], bool] = lambda: True
) -> None:
    """Run `act` once, just before a file of this name is opened for reading."""
    opens, left = builtins.open, [act]

    def watching(file: Any, *arguments: Any, **options: Any) -> Any:
        if left and str(file).endswith(name) and after():
            left.pop()()
        return opens(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watching)
    monkeypatch.setattr(io, "open", watching)  # what pathlib calls


def masks(bundle: Bundle, backend: Backend) -> np.ndarray:
    return np.stack(list(Segmenter.of_bundle(bundle, backend).probabilities(PIXELS, PROMPTS)))


@pytest.fixture(scope="session")
def right(tiny_bundle_path: Path) -> np.ndarray:
    """The masks of the bundle that is opened."""
    bundle = Bundle.open(tiny_bundle_path)
    return masks(bundle, OnnxRuntimeBackend(bundle, threads=1))


def test_the_other_bundle_gives_other_masks(other_bundle: Path, right: np.ndarray) -> None:
    other = Bundle.open(other_bundle)
    other.check_all()
    assert np.abs(masks(other, OnnxRuntimeBackend(other, threads=1)) - right).max() > 0.01


@pytest.mark.parametrize("make", [OnnxRuntimeBackend, OpenVinoBackend])
def test_a_bundle_replaced_after_it_was_opened_is_not_loaded(
    served: Path, other_bundle: Path, make: Callable[..., Backend]
) -> None:
    bundle = Bundle.open(served)
    backend = make(bundle, threads=1)
    put_in_place(other_bundle, served)
    for graph in GRAPHS:
        with pytest.raises(BundleError, match=REPLACED):
            backend.load(graph)
    for use in (bundle.tokenizer, bundle.check_all):
        with pytest.raises(BundleError, match=REPLACED):
            use()


def test_a_bundle_that_was_removed_is_told_as_such(served: Path) -> None:
    bundle = Bundle.open(served)
    shutil.rmtree(served)
    with pytest.raises(BundleError, match=REPLACED):
        bundle.tokenizer()


def test_a_graph_exchanged_between_check_and_load_is_not_used(
    served: Path, other_bundle: Path, right: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange happens when the file has been checked: as the runtime is called."""
    real = onnxruntime.InferenceSession

    def session(model: object, *arguments: Any, **options: Any) -> Any:
        for graph in GRAPHS:
            exchange(other_bundle, served, f"graphs/{graph}.onnx")
        return real(model, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    bundle = Bundle.open(served)
    bundle.read_ahead("fp32", *GRAPHS)
    for graph in GRAPHS[1:]:
        bundle._ahead[f"graphs/{graph}.onnx"].result()  # checked before the first exchange
    np.testing.assert_array_equal(masks(bundle, OnnxRuntimeBackend(bundle, threads=1)), right)


def test_a_graph_exchanged_between_check_and_load_is_not_used_by_openvino(
    served: Path, other_bundle: Path, right: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = load_openvino()
    real = openvino.Core.read_model

    def read_model(core: object, model: object, *arguments: Any, **options: Any) -> Any:
        exchange(other_bundle, served, "graphs/prompt_encoder.onnx")
        return real(core, model, *arguments, **options)

    monkeypatch.setattr(openvino.Core, "read_model", read_model)
    bundle = Bundle.open(served)
    backend = OpenVinoBackend(bundle, threads=1)
    backend.load("prompt_encoder")
    monkeypatch.setattr(openvino.Core, "read_model", real)
    np.testing.assert_allclose(masks(bundle, backend), right, atol=1e-4)


def test_a_tokenizer_exchanged_between_check_and_load_is_not_used(
    served: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Bundle.open(served).tokenizer().to_json()
    real = PromptTokenizer.parse

    def parse(*source: Any) -> PromptTokenizer:
        exchange(other_bundle, served, "tokenizer.json")
        return real(*source)

    monkeypatch.setattr(PromptTokenizer, "parse", parse)
    assert Bundle.open(served).tokenizer().to_json() == told


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_a_bundle_replaced_while_it_is_opened_is_the_old_one_or_the_new_one(
    served: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Checksums of one bundle and the manifest of another would pass here, were they read at two moments."""
    before_opening(monkeypatch, name, lambda: put_in_place(other_bundle, served))
    bundle = Bundle.open(served)
    monkeypatch.undo()
    found = Bundle.open(other_bundle)
    assert bundle.manifest == found.manifest
    assert bundle.identity == found.identity == hashlib.sha256((served / "SHA256SUMS").read_bytes()).hexdigest()
    assert bundle.check_all() == ()


def test_a_bundle_whose_name_is_missing_for_a_moment_is_opened(
    served: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames of a replacement."""
    served.rename(served.parent / "old")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            linked_copy(other_bundle, served.parent, served.name)

    monkeypatch.setattr("time.sleep", wait)
    assert Bundle.open(served).identity == Bundle.open(other_bundle).identity
    shutil.rmtree(served)
    waits.clear()
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(BundleError, match="There is no bundle at"):
        Bundle.open(served)
    assert len(waits) == 4


def test_checksums_that_change_at_every_look_end_in_an_error(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens, looks = builtins.open, []

    def watching(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("SHA256SUMS"):
            looks.append(file)
            (served / "SHA256SUMS").unlink()
            with opens(file, "w") as other:
                other.write(f"{len(looks):064x}  manifest.json\n")
        return opens(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watching)
    with pytest.raises(BundleError, match=r"manifest\.json was altered"):
        Bundle.open(served)
    assert len(looks) < 20


def test_a_graph_that_was_unloaded_is_not_loaded_again_from_another_bundle(
    served: Path, other_bundle: Path, right: np.ndarray
) -> None:
    bundle = Bundle.open(served)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    segmenter = Segmenter.of_bundle(bundle, backend)
    segmenter.warm_up()
    segmenter.prepare(PROMPTS)  # unloads the prompt encoder
    put_in_place(other_bundle, served)
    np.testing.assert_array_equal(np.stack(list(segmenter.probabilities(PIXELS, PROMPTS))), right)
    with pytest.raises(BundleError, match=REPLACED):
        segmenter.encode_prompts(["another prompt"])
    backend.unload("image_encoder")
    with pytest.raises(BundleError, match=REPLACED):
        segmenter.encode_image(PIXELS)


def test_no_kernel_of_another_bundle_is_kept_under_this_ones_hash(
    served: Path, other_bundle: Path, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "kernels"
    bundle = Bundle.open(served)
    segmenter = Segmenter.of_bundle(bundle, OnnxRuntimeBackend(bundle, threads=1), cache)
    segmenter.prepare(["a first prompt"])
    put_in_place(other_bundle, served)
    with pytest.raises(BundleError, match=REPLACED):
        segmenter.encode_prompts(PROMPTS)
    assert len(list(cache.iterdir())) == 1
    found = {}
    for path in (tiny_bundle_path, other_bundle):  # later processes, with one folder
        opened = Bundle.open(path)
        with_cache, without = (
            Segmenter.of_bundle(opened, OnnxRuntimeBackend(opened, threads=1), folder).encode_prompts(PROMPTS)
            for folder in (cache, None)
        )
        np.testing.assert_array_equal(with_cache.kernel, without.kernel)
        found[path] = with_cache
    assert not same(*found.values())


def same(one: PromptKernels, two: PromptKernels) -> bool:
    return np.array_equal(one.kernel, two.kernel)


def test_a_backend_of_another_bundle_is_refused(tiny_bundle: Bundle, other_bundle: Path) -> None:
    """It would compute kernels that go under this bundle's hash."""
    with pytest.raises(UsageError, match="opened with another bundle"):
        Segmenter.of_bundle(tiny_bundle, OnnxRuntimeBackend(Bundle.open(other_bundle), threads=1))


def test_references_exchanged_between_check_and_load_are_not_used(
    served: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = load_references(Bundle.open(served))[0].logits
    with np.load(served / "reference/seeded.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(other_bundle.parent / "forged.npz", **{**arrays, "logits": arrays["logits"] + 1})
    real = np.load

    def forge(*arguments: Any, **options: Any) -> Any:
        (served / "reference/seeded.npz").unlink(missing_ok=True)
        shutil.copyfile(other_bundle.parent / "forged.npz", served / "reference/seeded.npz")
        return real(served / "reference/seeded.npz") if not isinstance(arguments[0], io.BytesIO) else real(*arguments)

    monkeypatch.setattr(np, "load", forge)
    np.testing.assert_array_equal(load_references(Bundle.open(served))[0].logits, truth)


def edit(bundle: Bundle, meanwhile: Callable[[Path], object]) -> None:
    with edited_bundle(bundle) as folder:
        meanwhile(folder)
        write_manifest(folder, bundle.manifest.model_copy(update={"command": "edited"}))


def test_an_edit_gives_no_new_checksum_to_a_file_altered_meanwhile(served: Path, tiny_bundle_path: Path) -> None:
    """Before, what was written into a shared file between the check and the new checksums was called right."""
    graph = served / "graphs" / "fused.onnx"
    graph.unlink()
    shutil.copyfile(tiny_bundle_path / "graphs" / "fused.onnx", graph)  # of its own, so that no other test sees it
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1

    def alter(_: Path) -> None:
        with graph.open("r+b") as file:
            file.write(content)

    with pytest.raises(BundleError, match=r"fused\.onnx was altered"):
        edit(Bundle.open(served), alter)
    assert sorted(os.listdir(served.parent)) == ["served.cclip"]


def test_an_edit_does_not_replace_a_bundle_that_took_its_place_meanwhile(served: Path, other_bundle: Path) -> None:
    """Two builds at once: before, both succeeded, and one's engines were gone."""
    with pytest.raises(BundleError, match=REPLACED):
        edit(Bundle.open(served), lambda _: put_in_place(other_bundle, served))
    assert Bundle.open(served).identity == Bundle.open(other_bundle).identity


def test_an_edit_links_nothing_from_a_bundle_that_took_its_place(
    served: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged between the check and the link: before, the exchanged file got a new checksum that called it right."""
    link = os.link

    def exchange_first(source: Path, target: Path) -> None:
        if Path(source).name == "mask_decoder.onnx":
            exchange(other_bundle, served, "graphs/mask_decoder.onnx")
        link(source, target)

    monkeypatch.setattr(os, "link", exchange_first)
    with pytest.raises(BundleError, match=r"mask_decoder\.onnx was altered"):
        edit(Bundle.open(served), lambda _: None)
