"""Loading CLIP's weights into both towers, from a file or by open_clip's name."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cclip_deploy.errors import CheckpointError, EnvironmentIssue
from cclip_deploy.model.clip_start import check_clip_source, load_clip_weights
from cclip_deploy.model.config import TINY
from cclip_deploy.model.network import CausalCLIPSeg
from tests.model.open_clip_twin import open_clip_twin

RESIDUAL = {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.fixture
def network() -> CausalCLIPSeg:
    torch.manual_seed(9)
    return CausalCLIPSeg(TINY)


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    twin = open_clip_twin(TINY, seed=3)
    for norm in twin.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()  # type: ignore[union-attr]
    assert isinstance(twin, nn.Module)
    return twin


@pytest.fixture(scope="module")
def clip_file(clip: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file(clip.state_dict(), path)
    return path


def towers_equal(network: CausalCLIPSeg, clip: nn.Module) -> bool:
    weights = clip.state_dict()
    return all(
        torch.equal(tensor, weights[f"visual.{name}"])
        for name, tensor in network.image_tower.state_dict().items()
        if ".connect." not in name
    ) and all(torch.equal(tensor, weights[name]) for name, tensor in network.text_tower.state_dict().items())


def test_both_towers_take_clip_s_weights_and_only_the_residual_has_none(
    network: CausalCLIPSeg, clip: nn.Module, clip_file: Path
) -> None:
    assert not towers_equal(network, clip)
    start = load_clip_weights(network, str(clip_file))
    assert towers_equal(network, clip)
    assert set(start.missing) == {f"image_tower.attnpool.connect.{name}" for name in RESIDUAL}
    assert len(start.found) == len(clip.state_dict()) - 1  # all but the temperature


def test_neck_and_heads_keep_their_own_weights(network: CausalCLIPSeg, clip_file: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "tower" not in name}
    load_clip_weights(network, str(clip_file))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_network_can_still_be_trained(network: CausalCLIPSeg, clip_file: Path) -> None:
    load_clip_weights(network, str(clip_file))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in network.parameters())
    assert network.training


def test_torch_file_in_half_precision_with_openai_s_sizes_inside(
    network: CausalCLIPSeg, clip: nn.Module, tmp_path: Path
) -> None:
    weights = {name: t.half() if t.is_floating_point() else t for name, t in clip.state_dict().items()}
    weights |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(weights, tmp_path / "clip.pt")
    load_clip_weights(network, str(tmp_path / "clip.pt"))
    loaded = network.text_tower.text_projection
    assert loaded.dtype is torch.float32
    assert torch.equal(loaded, clip.state_dict()["text_projection"].half().float())


def test_counters_may_be_absent(network: CausalCLIPSeg, clip: nn.Module, tmp_path: Path) -> None:
    weights = {name: t for name, t in clip.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(weights, tmp_path / "old.safetensors")
    load_clip_weights(network, str(tmp_path / "old.safetensors"))
    assert towers_equal(network, clip)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vision_layers": (3, 4, 6, 3)}, "RN50"),
        ({"text_layers": 3}, "text_tower.transformer.resblocks.2"),
        ({"text_width": 32}, "text_tower.positional_embedding"),
    ],
)
def test_clip_of_another_size_is_refused_by_name(
    change: dict[str, object], name: str, network: CausalCLIPSeg, tmp_path: Path
) -> None:
    twin = open_clip_twin(dataclasses.replace(TINY, vocabulary_size=8, **change))  # type: ignore[arg-type]
    save_file(twin.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit config 'tiny'.*RN101-quickgelu") as caught:
        load_clip_weights(network, str(tmp_path / "other.safetensors"))
    assert name in str(caught.value)


def test_clip_with_tensors_missing_is_refused_and_changes_nothing(
    network: CausalCLIPSeg, clip: nn.Module, tmp_path: Path
) -> None:
    before = network.text_tower.ln_final.weight.clone()
    weights = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("text_projection")}
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks text_tower\.text_projection, which"):
        load_clip_weights(network, str(tmp_path / "part.safetensors"))
    assert torch.equal(network.text_tower.ln_final.weight, before)


def test_a_file_without_clip_s_names_is_not_clip(network: CausalCLIPSeg, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a CLIP network"):
        load_clip_weights(network, str(tiny_checkpoint))


def test_neither_a_file_nor_a_name_lists_the_names(network: CausalCLIPSeg) -> None:
    with pytest.raises(CheckpointError, match=r"'openia' is neither a file nor .*openai"):
        load_clip_weights(network, "openia")


def test_a_name_of_open_clip_s_is_fetched_by_open_clip(
    network: CausalCLIPSeg, clip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def create_model(architecture: str, pretrained: str) -> nn.Module:
        asked.append((architecture, pretrained))
        return clip

    monkeypatch.setattr(open_clip, "create_model", create_model)
    load_clip_weights(network, "yfcc15m")
    assert asked == [("RN101-quickgelu", "yfcc15m")]
    assert towers_equal(network, clip)


def test_weights_that_cannot_be_fetched_are_an_environment_issue(
    network: CausalCLIPSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(architecture: str, pretrained: str) -> Tensor:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(EnvironmentIssue, match=r"could not fetch RN101-quickgelu 'openai': no route to host"):
        load_clip_weights(network, "openai")


def test_without_a_network_the_check_names_the_file_option_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    started = time.monotonic()
    with pytest.raises(EnvironmentIssue, match="--clip-weights FILE"):
        check_clip_source("openai")
    assert time.monotonic() - started < 5
    with pytest.raises(CheckpointError, match="neither a file nor"):
        check_clip_source("openia")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
        monkeypatch.setattr("cclip_deploy.model.clip_start.LONGEST_WAIT_S", 0.3)
        with pytest.raises(EnvironmentIssue, match="could not be reached"):
            check_clip_source("openai")


def test_cached_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: "/cache/file")
    check_clip_source("openai")
