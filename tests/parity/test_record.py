"""References start from prompts and images, with useful masks if possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import ImageError, PromptError
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.parity.record import make_references
from cclip_deploy.parity.reference import load_references
from cclip_deploy.parity.source import PROBE_SENTENCES, Source, pack_pixels, unpack_pixels
from cclip_deploy.runtime.pytorch import PyTorchBackend

HW = (64, 96)


def source_of(bundle: Bundle) -> Source:
    (found,) = (reference.source for reference in load_references(bundle) if reference.source)
    return found


def test_ids_are_those_of_open_clip(tiny_bundle: Bundle) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    source = source_of(tiny_bundle)
    expected = SimpleTokenizer()(list(source.sentences), context_length=77).numpy()
    np.testing.assert_array_equal(source.ids, expected)
    assert set(PROBE_SENTENCES) < set(source.sentences)
    assert (source.ids[:, -1] == 0).all()  # none was cut
    assert len(np.unique(source.ids)) > 150


def test_inputs_are_those_of_torchs_own_resize_of_other_sizes_than_the_networks(tiny_bundle: Bundle) -> None:
    """Torch's antialiased bicubic is another implementation of the same filter."""
    pictures = load_references(tiny_bundle)[1]
    source = source_of(tiny_bundle)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    for raw, found in zip(source.pictures, [*pictures.image, *source.probe_inputs], strict=True):
        pixels = torch.from_numpy(np.atleast_3d(raw).astype(np.float32) / 255).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(pixels, HW, mode="bicubic", antialias=True).clamp(0, 1)[0]
        np.testing.assert_allclose(found, ((resized - mean) / std).numpy(), atol=1e-4)
    sizes = [raw.shape[:2] for raw in source.pictures]
    assert all(h * 3 != w * 2 or h != w for h, w in sizes)
    assert any(h > HW[0] and w > HW[1] for h, w in sizes)
    assert any(h < HW[0] and w < HW[1] for h, w in sizes)


def test_masks_are_the_networks_at_the_pictures_own_size(tiny_bundle: Bundle) -> None:
    pictures, source = load_references(tiny_bundle)[1], source_of(tiny_bundle)
    for raw, masks, logits in zip(source.pictures, source.masks, pictures.logits, strict=False):
        assert masks.shape == (len(pictures.tokens), *raw.shape[:2])
        for mask, each in zip(masks, logits, strict=True):
            probability = 1 / (1 + np.exp(-each.astype(np.float64)))
            resized = Image.fromarray(probability.astype(np.float32)).resize(
                mask.shape[::-1], Image.Resampling.BILINEAR
            )
            assert ((np.asarray(resized) >= 0.5) == mask).mean() > 0.999


class Constant(PyTorchBackend):
    """A network whose logits are given: an area for each call and prompt."""

    def __init__(self, model: CausalCLIPSeg, areas: list[list[float]]) -> None:
        super().__init__(model)
        self.areas, self.calls = areas, 0

    def all_pairs(self, image: Any, tokens: Any) -> np.ndarray:
        shares = self.areas[min(self.calls, len(self.areas) - 1)]
        self.calls += 1
        logits = np.full((len(image), len(tokens), HW[0] * HW[1]), -1, np.float32)
        for number in range(len(tokens)):
            logits[:, number, : round(shares[number % len(shares)] * HW[0] * HW[1])] = 1
        return logits.reshape(len(image), len(tokens), *HW)


def test_prompts_and_images_with_useful_masks_are_chosen(tiny_network: CausalCLIPSeg, tiny_bundle: Bundle) -> None:
    network = Constant(tiny_network, [[0, 0.001, 0.3, 0, 0, 0.5, 0]])
    found = make_references(network, tiny_bundle.manifest)[1]
    assert sorted((found.logits >= 0).mean(axis=(2, 3))[0]) == pytest.approx([0.3, 0.5], abs=1e-3)
    assert network.calls == 2  # the first pictures, and the seeded ones: no more had to be drawn
    network = Constant(tiny_network, [[0], [0, 0.4, 0, 0, 0.2], [0]])
    found = make_references(network, tiny_bundle.manifest)[1]
    assert ((found.logits >= 0).mean(axis=(2, 3)) > 0.1).all()


def test_where_no_mask_has_a_useful_size_the_search_ends(tiny_network: CausalCLIPSeg, tiny_bundle: Bundle) -> None:
    network = Constant(tiny_network, [[0]])
    found = make_references(network, tiny_bundle.manifest)[1]
    assert found.logits.shape[:2] == (2, 2)
    assert network.calls == 4


def test_given_images_and_prompts_are_used_unchanged(
    tiny_network: CausalCLIPSeg, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    prompts = ["left lung", "heart", "rib"]
    found = make_references(PyTorchBackend(tiny_network), tiny_bundle.manifest, [tmp_path / "a.png"], prompts)[1]
    assert found.source is not None
    assert list(found.source.sentences[:3]) == prompts
    np.testing.assert_array_equal(found.source.pictures[0], pixels)
    np.testing.assert_array_equal(found.tokens, [tiny_bundle.tokenizer().encode(text, 24) for text in prompts])


def test_a_given_prompt_or_image_that_cannot_be_used_raises(
    tiny_network: CausalCLIPSeg, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    network, manifest = PyTorchBackend(tiny_network), tiny_bundle.manifest
    with pytest.raises(PromptError, match="room for 24"):
        make_references(network, manifest, [], ["lung", "lung " * 30])
    with pytest.raises(PromptError, match="empty"):
        make_references(network, manifest, [], ["lung", " "])
    with pytest.raises(ImageError, match="does not exist"):
        make_references(network, manifest, [tmp_path / "none.png"], [])


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_pixels_are_packed_without_loss(kind: type, white: int, tmp_path: Path) -> None:
    raw = np.arange(white + 1, dtype=kind).reshape(16, -1)
    Image.fromarray(raw).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png").pixels
    packed = pack_pixels(pixels)
    assert packed.dtype == kind
    np.testing.assert_array_equal(packed, raw)
    np.testing.assert_array_equal(unpack_pixels(packed), pixels)
    odd = (pixels / np.float32(3)).astype(np.float32)
    assert pack_pixels(odd) is odd


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_large_image_is_reduced_to_four_times_the_network_size(
    channels: tuple[int, ...], tiny_network: CausalCLIPSeg, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """A bundle does not carry a whole radiograph; the shorter side, below the limit, stays as it is."""
    ramp = np.broadcast_to(np.linspace(0, 255, 1000)[None, :, *[None for _ in channels]], (100, 1000, *channels))
    Image.fromarray(np.rint(ramp).astype(np.uint8)).save(tmp_path / "large.png")
    network = PyTorchBackend(tiny_network)
    reference = make_references(network, tiny_bundle.manifest, [tmp_path / "large.png"], ["left lung"])[1]
    assert reference.source is not None
    kept = reference.source.pictures[0]
    assert (kept.shape, kept.dtype) == ((100, 4 * HW[1], *channels), np.uint16)
    expected = np.linspace(0, 1, 4 * HW[1])
    np.testing.assert_allclose(unpack_pixels(kept)[50].reshape(4 * HW[1], -1)[:, 0], expected, atol=0.01)
