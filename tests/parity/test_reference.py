"""Reference inputs are the same on every machine, and damaged reference files raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import BundleError
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.reference import (
    SUBSAMPLED,
    TILE,
    Reference,
    expand,
    load_references,
    record,
    save_reference,
    seeded_inputs,
    subsample,
)
from cclip_deploy.runtime.pytorch import PyTorchBackend
from tests.bundles import copy_of, linked_copy, reseal


@pytest.mark.parametrize("length", [3, 4, 24, 77])
def test_seeded_tokens_are_well_formed_prompts_of_two_lengths(length: int) -> None:
    image, tokens = seeded_inputs((64, 96), length)
    assert image.shape == (2, 3, 64, 96)
    assert tokens.shape == (2, length)
    assert image.dtype == np.float32
    assert tokens.dtype == np.int64
    for row in tokens:
        end = int(row.argmax())
        assert (row[0], row[end]) == (49406, 49407)
        assert ((row[1:end] > 0) & (row[1:end] < 49406)).all()
        assert end >= 2
        assert not row[end + 1 :].any()
    assert tokens[0].argmax() == length - 1  # the longest that fits


def test_seeded_inputs_are_the_same_every_time_and_fill_every_scale() -> None:
    image, tokens = seeded_inputs((64, 96), 24)
    again, tokens_again = seeded_inputs((64, 96), 24)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(tokens, tokens_again)
    assert abs(float(image.mean())) < 0.3
    assert 0.7 < float(image.std()) < 1.4
    assert np.abs(image[0] - image[1]).max() > 1


def test_pairs_are_every_picture_with_every_prompt() -> None:
    image = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1) * np.ones((1, 3, 2, 2), np.float32)
    tokens = np.array([[1], [2], [3]])
    rows, row_tokens = Reference("r", image, tokens, np.zeros((2, 3, 2, 2), np.float32)).pairs()
    assert rows[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert row_tokens[:, 0].tolist() == [1, 2, 3, 1, 2, 3]


def test_tiles_are_expanded_to_pixels() -> None:
    tile = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    blown = expand({"features": tile, "bias": np.ones(1, np.float32)})
    assert blown["features"].shape == (1, 2 * TILE, 3 * TILE, 1)
    np.testing.assert_array_equal(blown["features"][0, ::TILE, ::TILE, 0], tile[0, :, :, 0])
    assert len(np.unique(blown["features"][0, :TILE, :TILE, 0])) == 1
    np.testing.assert_array_equal(blown["bias"], [1])


def test_large_outputs_are_subsampled_and_small_ones_are_not() -> None:
    features = np.arange(2 * 32 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 32)
    assert subsample("features", features).shape == (2, 2, 2, 2)
    assert subsample("mask4", features).shape == (2, 1, 8, 32)
    assert subsample("kernel", features) is features
    assert set(SUBSAMPLED) == {"features", "mask3", "mask4", "mask5", "confounding_features"}


def test_references_are_saved_and_loaded_unchanged(tiny_network: CausalCLIPSeg, tmp_path: Path) -> None:
    image, tokens = seeded_inputs((32, 32), 8)
    graphs = ("image_encoder", "prompt_encoder", "mask_decoder", "fused")
    made = record("seeded", PyTorchBackend(tiny_network), image, tokens, graphs)
    np.testing.assert_array_equal(made.logits, PyTorchBackend(tiny_network).all_pairs(image, tokens))
    full = PyTorchBackend(tiny_network).run("image_encoder", {"image": image})["features"]
    np.testing.assert_array_equal(made.outputs["image_encoder"]["features"], full[:, ::4, ::4, ::16])
    save_reference(made, tmp_path / "seeded.npz")
    with np.load(tmp_path / "seeded.npz", allow_pickle=False) as file:
        assert {name.split("/")[0] for name in file.files} == {"image", "tokens", "logits", "in", "out"}
        np.testing.assert_array_equal(file["out/mask_decoder/logits"], made.outputs["mask_decoder"]["logits"])
        assert file["in/features"].nbytes * TILE**2 == full[:1].nbytes  # kept as tiles


def test_a_plain_bundle_needs_logits_only(tiny_network: CausalCLIPSeg) -> None:
    image, tokens = seeded_inputs((32, 32), 8)
    made = record("seeded", PyTorchBackend(tiny_network), image, tokens, ("plain",))
    assert (made.outputs, made.decoder_inputs) == ({}, {})
    assert made.logits.shape == (2, 2, 32, 32)


def test_references_contain_the_outputs_of_the_network(tiny_bundle: Bundle, tiny_network: CausalCLIPSeg) -> None:
    seeded, pictures = load_references(tiny_bundle)
    assert (seeded.name, pictures.name) == ("seeded", "pictures")
    image, tokens = seeded_inputs((64, 96), 24)
    np.testing.assert_array_equal(seeded.image, image)
    np.testing.assert_array_equal(seeded.tokens, tokens)
    truth = PyTorchBackend(tiny_network).all_pairs(image, tokens)
    np.testing.assert_allclose(seeded.logits, truth, atol=1e-5 * float(np.abs(truth).max()))
    assert seeded.outputs.keys() == {"image_encoder", "prompt_encoder", "mask_decoder"}


Arrays = dict[str, np.ndarray]


def without(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.pop(name)


def with_array(name: str, value: np.ndarray) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("image"), "is not a reference"),
        (without("out/prompt_encoder/bias"), "no prompt_encoder/bias"),
        (without("out/mask_decoder/logits"), "no mask_decoder/logits"),
        (without("in/tap_bias"), "no tap_bias"),
        (with_array("image", np.zeros((2, 3, 32, 32), np.float32)), r"image \(2, 3, 32, 32\)"),
        (with_array("image", np.zeros((0, 3, 64, 96), np.float32)), r"image \(0, 3, 64, 96\)"),
        (with_array("tokens", np.zeros((2, 23), np.int64)), r"tokens \(2, 23\)"),
        (with_array("logits", np.zeros((1, 1, 64, 96), np.float32)), r"logits \(1, 1, 64, 96\)"),
        (with_array("out/odd", np.zeros(1)), "is not a reference"),
        (with_array("image", np.array([{"an": "object"}], dtype=object)), "is not a reference"),
    ],
)
def test_references_that_do_not_match_the_graphs_raise(
    change: Callable[[Arrays], object], said: str, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    path = copy / "reference" / "seeded.npz"
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez_compressed(path, **arrays)
    reseal(copy)
    with pytest.raises(BundleError, match=said):
        load_references(Bundle.open(copy))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("source/ids"), "is not a reference"),
        (without("source/picture/3"), "do not match its 3 images"),
        (without("source/mask/1"), "do not match its 4 images"),
        (with_array("source/ids", np.zeros((1, 77), np.int64)), r"source ids \(1, 77\)"),
        (with_array("source/picture/0", np.zeros((5, 5, 4), np.uint8)), r"source image \(5, 5, 4\)"),
        (with_array("source/picture/0", np.zeros((5, 5), np.float64)), "source image of float64"),
        (with_array("source/mask/0", np.zeros((1, 96, 15), np.uint8)), "masks"),
        (with_array("source/probe_inputs", np.zeros((2, 3, 8, 8), np.float32)), "probe inputs"),
        (with_array("source/preprocessing", np.array("{}]")), "is not a reference"),
    ],
)
def test_a_source_that_does_not_match_its_reference_raises(
    change: Callable[[Arrays], object], said: str, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = linked_copy(tiny_bundle_path, tmp_path)
    path = copy / "reference" / "pictures.npz"
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    path.unlink()
    np.savez_compressed(path, **arrays)
    reseal(copy)
    with pytest.raises(BundleError, match=said):
        load_references(Bundle.open(copy))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(200), b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_not_an_npz_raises(content: bytes, tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    (copy / "reference" / "seeded.npz").write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=r"seeded\.npz is not a reference"):
        load_references(Bundle.open(copy))


def test_a_truncated_npz_and_a_single_array_are_refused(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    path = copy / "reference" / "seeded.npz"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[5000:5100] = bytes(100)
    np.save(tmp_path / "one.npy", np.ones(3))
    for content in (whole[: len(whole) // 2], bytes(damaged), (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        reseal(copy)
        with pytest.raises(BundleError, match="is not a reference"):
            load_references(Bundle.open(copy))


def test_a_bundle_without_references_is_refused(tiny_bundle_path: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_bundle_path, tmp_path)
    reseal(copy, lambda manifest: manifest.update(references=[]))
    with pytest.raises(BundleError, match="has no references"):
        load_references(Bundle.open(copy))
