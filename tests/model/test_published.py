"""Published tensor names, and outputs equal to those of the published network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cclip_deploy.errors import CheckpointError
from cclip_deploy.model.checkpoint import load_checkpoint
from cclip_deploy.model.config import RN101
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.published import (
    from_published,
    image_tower_name,
    is_published_layout,
    is_unused,
    network_name,
    to_published,
)
from tests.model.published_stub import published_stub
from tests.numerics import relative_error
from tests.published.checkpoint import example, golden, layout

LIMIT = 1e-5


def test_931_tensors_are_live_and_60_are_dropped() -> None:
    live, dropped = from_published(published_stub(), "checkpoint")
    assert len(live) == 931
    assert len(dropped) == 60
    assert {key for key in dropped if not key.startswith("neck_ad.")} == {"backbone.logit_scale"}


def test_dropped_tensors_of_the_neck_are_those_of_the_modules_that_never_run() -> None:
    """Spec, causal neck: the modules that would use the text stand in the checkpoint, never run."""
    dropped = [key for key in layout() if is_unused(key) and key.startswith("neck_ad.")]
    assert len(dropped) == 59
    assert {key.split(".")[1] for key in dropped} == {
        "txt_proj", "f1_v_proj", "norm_layer", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj3", "coordconv",
    }  # fmt: skip


def test_live_tensors_are_the_network_s_own_in_name_and_shape() -> None:
    with torch.device("meta"):
        network = CausalCLIPSeg(RN101)
    live, _ = from_published(published_stub(), "checkpoint")
    assert {n: t.shape for n, t in live.items()} == {n: t.shape for n, t in network.state_dict().items()}


def test_every_live_name_is_translated_there_and_back() -> None:
    live = [key for key in layout() if not is_unused(key)]
    names = [network_name(key) for key in live]
    assert len(set(names)) == len(live)
    assert [to_published(str(name)) for name in names] == live


@pytest.mark.parametrize(
    ("published", "own"),
    [
        ("backbone.visual.layer3.22.bn2.running_var", "image_tower.layer3.22.bn2.running_var"),
        ("backbone.visual.attnpool.connect.0.weight", "image_tower.attnpool.connect.0.weight"),
        ("backbone.transformer.resblocks.11.ln_2.bias", "text_tower.transformer.resblocks.11.ln_2.bias"),
        ("neck_ad.masker5.coordconv2.conv1.0.weight", "neck.masker5.relocate.block.0.weight"),
        ("neck_ad.masker3.conv.bias", "neck.masker3.score.bias"),
        ("proj.txt.weight", "head.prompt.weight"),
        ("proj_ad.vis.4.bias", "confounding_head.mix.bias"),
        ("proj_ad.vision.bias", None),
        ("module.proj.txt.weight", None),
    ],
)
def test_published_names_have_the_paper_s_words_here(published: str, own: str | None) -> None:
    assert network_name(published) == own


def test_no_published_name_of_a_tensor_that_is_not_ours() -> None:
    with pytest.raises(KeyError):
        to_published("optimizer.step")


def test_unused_tensors_may_be_absent() -> None:
    tensors = {key: value for key, value in published_stub().items() if not is_unused(key)}
    live, dropped = from_published(tensors, "checkpoint")
    assert (len(live), dropped) == (931, ())


@pytest.mark.parametrize(
    ("blocks", "name"),
    [((3, 4, 6, 3), "RN50"), ((3, 4, 23, 3), "RN101"), ((4, 6, 10, 6), "RN50x4"), ((3, 15, 36, 10), "RN50x64")],
)
def test_image_towers_are_recognized_by_their_blocks(blocks: tuple[int, ...], name: str) -> None:
    keys = [f"backbone.visual.layer{s}.{b}.conv1.weight" for s, n in enumerate(blocks, 1) for b in range(n)]
    assert image_tower_name(keys) == name
    if name != "RN101":
        with pytest.raises(CheckpointError, match=rf"^my.pth was trained on CLIP {name};"):
            from_published(dict.fromkeys(keys, torch.zeros(())), "my.pth")


def test_unknown_names_are_listed_up_to_six() -> None:
    unknown = {f"fuse.{number}": torch.zeros(()) for number in range(8)}
    with pytest.raises(CheckpointError, match=r"fuse.0, fuse.1, fuse.2, fuse.3, fuse.4, fuse.5 …\. Is it"):
        from_published({**published_stub(), **unknown}, "my.pth")


def test_the_layout_is_recognized_by_any_of_its_three_parts() -> None:
    assert is_published_layout(["x", "neck_ad.aggr.0.weight"])
    assert is_published_layout(["backbone.visual.conv1.weight"])
    assert not is_published_layout(["visual.conv1.weight", "image_tower.conv1.weight", "head.mix.bias"])


def computed_by(network: CausalCLIPSeg, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Compute the arrays of the golden files, subsampled like them."""
    pyramid = network.image_tower(image)
    neck = network.neck(pyramid)
    state = network.text_tower(tokens)
    return {
        "v3": pyramid.v3[:, ::16, ::4, ::4],
        "v4": pyramid.v4[:, ::16, ::2, ::2],
        "v5": pyramid.v5[:, ::16],
        **{f"mask{level}": mask[:, ::16, ::2, ::2] for level, mask in zip((3, 4, 5), neck.masks, strict=True)},
        "carafe": neck.carafe[:, ::16, ::2, ::2],
        "causal_features": neck.causal[:, ::16, ::2, ::2],
        "confounding_features": neck.confounding[:, ::16, ::2, ::2],
        "text_state": state,
        "causal_logits": network.head(neck.causal, state),
        "confounding_logits": network.confounding_head(neck.confounding, state),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "example_sizes"),
    [("224", 0, (0, 2, 224, 32)), ("256x320", 1, (1, 1, 256, 20, 320))],
)
def test_network_computes_what_the_published_one_computes(
    name: str,
    seed: int,
    example_sizes: tuple[int, ...],
    published_checkpoint: Callable[[int], Path],
) -> None:
    image, tokens = (torch.from_numpy(value) for value in example(*example_sizes))
    loaded = load_checkpoint(published_checkpoint(seed))
    assert (len(loaded.model.state_dict()), len(loaded.dropped)) == (931, 60)
    with torch.inference_mode():
        actual = computed_by(loaded.model, image, tokens)
    expected = {key: torch.from_numpy(value) for key, value in golden(name).items() if key != "image_seed"}
    assert actual.keys() == expected.keys()
    errors = {key: relative_error(actual[key], expected[key]) for key in expected}
    assert {key: error for key, error in errors.items() if not error <= LIMIT} == {}
