"""Saving and loading checkpoints of both layouts, and error messages."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cclip_deploy.common.files import sha256_file
from cclip_deploy.errors import CheckpointError, EnvironmentIssue
from cclip_deploy.model import checkpoint
from cclip_deploy.model.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from cclip_deploy.model.config import RN101, TINY, InputForm
from cclip_deploy.model.network import CausalCLIPSeg
from tests.model.open_clip_twin import open_clip_twin
from tests.model.published_stub import published_stub
from tests.published.checkpoint import layout

Tensors = dict[str, Tensor]


@pytest.fixture
def save_published(tmp_path: Path) -> Callable[[object], Path]:
    def save(content: object) -> Path:
        torch.save(content, tmp_path / "published.pth")
        return tmp_path / "published.pth"

    return save


@pytest.fixture
def save_ours(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    """Writes the tiny checkpoint with its tensors changed."""

    def save(change: Callable[[Tensors], None]) -> Path:
        tensors = load_file(tiny_checkpoint)
        change(tensors)
        metadata = {checkpoint.FORMAT: json.dumps(TINY.to_dict())}
        save_file(tensors, tmp_path / "changed.safetensors", metadata)
        return tmp_path / "changed.safetensors"

    return save


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_our_layout_gives_back_every_bit_and_the_config(tiny_network: CausalCLIPSeg, tiny_checkpoint: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    expected = tiny_network.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert (loaded.config, loaded.layout, loaded.dropped) == (TINY, "ours", ())
    assert loaded.sha256 == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest() == sha256_file(tiny_checkpoint)


def test_loaded_network_is_frozen_and_in_evaluation_mode(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_loaded_network_does_not_change_with_its_file(
    suffix: str, tiny_network: CausalCLIPSeg, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    shutil.copy(tiny_checkpoint, path)
    if suffix == ".pth":
        torch.save(load_file(tiny_checkpoint), path)
    tensors = read_tensors(path)
    model = checkpoint._build(TINY, tensors, path, "ours")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in tiny_network.state_dict().items())


def test_folders_on_the_way_are_made(tiny_network: CausalCLIPSeg, tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_network, tmp_path / "deep" / "folder" / "again.safetensors")
    assert [file.name for file in (tmp_path / "deep" / "folder").iterdir()] == ["again.safetensors"]
    again = load_file(tmp_path / "deep" / "folder" / "again.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(tiny_checkpoint).items())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    failure: BaseException, tiny_network: CausalCLIPSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")

    def stop_halfway(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half of the new one")
        raise failure

    monkeypatch.setattr(checkpoint, "save_file", stop_halfway)
    expected = EnvironmentIssue if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_checkpoint(tiny_network, path)
    assert isinstance(failure, KeyboardInterrupt) or "The disk is full" in str(caught.value)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.safetensors", b"the old one")]


def test_a_folder_that_cannot_be_made_is_an_environment_issue(tiny_network: CausalCLIPSeg, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentIssue, match="could not be written"):
        save_checkpoint(tiny_network, tmp_path / "file" / "model.safetensors")


def test_weights_of_half_precision_come_as_float32(save_ours: Callable[..., Path], tiny_network: CausalCLIPSeg) -> None:
    def halve(tensors: Tensors) -> None:
        tensors.update({name: t.half() for name, t in tensors.items() if t.is_floating_point()})

    loaded = load_checkpoint(save_ours(halve)).model.head.mix.weight
    assert loaded.dtype is torch.float32
    assert torch.equal(loaded, tiny_network.head.mix.weight.half().float())


def test_a_whole_published_checkpoint_is_loaded_from_its_wrapping(save_published: Callable[..., Path]) -> None:
    wrapped = {"epoch": 1, "best": 0.9, "state_dict": {f"module.{key}": t for key, t in published_stub().items()}}
    loaded = load_checkpoint(save_published(wrapped))
    assert (loaded.config, loaded.layout) == (RN101, "published")
    assert (len(loaded.model.state_dict()), len(loaded.dropped)) == (931, 60)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_every_usual_wrapping_is_taken_off(key: str, save_published: Callable[..., Path]) -> None:
    tensors = {name: torch.full((), float(n)).expand(shape) for n, (name, shape) in enumerate(layout().items())}
    bare = read_tensors(save_published(tensors))
    bare = {name: tensor.flatten()[:1].clone() for name, tensor in bare.items()}
    for wrapped in ({key: tensors}, {key: {f"module.{name}": t for name, t in tensors.items()}, "optimizer": {}}):
        read = read_tensors(save_published(wrapped))
        assert read.keys() == bare.keys()
        assert all(torch.equal(read[name].flatten()[:1], bare[name]) for name in bare)


def test_missing_tensors_of_a_published_checkpoint_are_named_as_published(save_published: Callable[..., Path]) -> None:
    tensors = published_stub()
    del tensors["neck_ad.masker4.coordconv2.conv1.0.weight"], tensors["backbone.positional_embedding"]
    message = refusal(save_published(tensors))
    assert "lacks 2 tensors" in message
    assert "neck_ad.masker4.coordconv2.conv1.0.weight" in message
    assert "backbone.positional_embedding" in message


def test_a_published_checkpoint_cut_off_in_its_image_tower_is_one_that_lacks_tensors(
    save_published: Callable[..., Path],
) -> None:
    tensors = {key: value for key, value in published_stub().items() if "visual.layer4.2." not in key}
    message = refusal(save_published(tensors))
    assert "lacks 18 tensors: backbone.visual.layer4.2.conv1.weight" in message
    assert message.count("backbone.visual.") == 6
    assert " …. " in message


def test_extra_tensors_of_a_published_checkpoint_are_named(save_published: Callable[..., Path]) -> None:
    for name in ("decoder.layers.0.weight", "backbone.visual.layer5.weight"):
        message = refusal(save_published({**published_stub(), name: torch.zeros(2)}))
        assert name in message


def test_misshaped_tensors_of_a_published_checkpoint_are_named_with_both_shapes(
    save_published: Callable[..., Path],
) -> None:
    message = refusal(save_published({**published_stub(), "proj.txt.bias": torch.zeros(2304)}))
    assert "1 tensor of another shape: proj.txt.bias (2304,) instead of (2305,)" in message


def test_a_checkpoint_on_rn50_is_named_as_such(save_published: Callable[..., Path]) -> None:
    tensors = {key: value for key, value in published_stub().items() if _is_block_of_rn50(key)}
    tensors["backbone.visual.attnpool.c_proj.weight"] = torch.zeros(1024, 2048)
    assert "was trained on CLIP RN50; " in refusal(save_published(tensors))


def _is_block_of_rn50(key: str) -> bool:
    _, _, rest = key.partition("visual.layer3.")
    return not rest or int(rest.split(".")[0]) < 6


def test_a_checkpoint_on_a_vision_transformer_is_named_as_such(save_published: Callable[..., Path]) -> None:
    message = refusal(save_published({"backbone.visual.class_embedding": torch.zeros(768)}))
    assert "vision transformer" in message


def test_a_clip_network_without_neck_and_heads_is_refused(save_published: Callable[..., Path]) -> None:
    message = refusal(save_published(open_clip_twin(TINY).state_dict()))
    assert "is a CLIP network without" in message


def test_another_network_is_described_by_its_tensors(save_published: Callable[..., Path]) -> None:
    message = refusal(save_published({"encoder.weight": torch.zeros(1), "encoder.bias": torch.zeros(1)}))
    assert "it has encoder.weight, encoder.bias" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, save_ours: Callable[..., Path]) -> None:
    message = refusal(save_ours(lambda tensors: tensors["neck.masker3.score.weight"].view(-1)[77:78].fill_(value)))
    assert "1 tensor with values that are not finite: neck.masker3.score.weight" in message


def test_a_weight_that_float32_cannot_hold_is_not_finite(save_ours: Callable[..., Path]) -> None:
    message = refusal(
        save_ours(lambda tensors: tensors.update({"head.mix.bias": torch.full((32,), 1e300, dtype=torch.float64)}))
    )
    assert "head.mix.bias" in message


def test_missing_and_extra_tensors_are_named(save_ours: Callable[..., Path]) -> None:
    assert "lacks 1 tensor: head.mix.bias" in refusal(save_ours(lambda tensors: tensors.pop("head.mix.bias")))
    assert "1 tensor too many: spare" in refusal(save_ours(lambda tensors: tensors.update(spare=torch.zeros(1))))


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    assert "There is no checkpoint at" in refusal(tmp_path / "absent.pth")
    assert "There is no checkpoint at" in refusal(tmp_path)


def test_the_same_weights_make_the_same_bytes(tmp_path: Path, tiny_network: CausalCLIPSeg) -> None:
    for name in "ab":
        save_checkpoint(tiny_network, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_input_form_of_training_is_saved_and_loaded(tiny_network: CausalCLIPSeg, tmp_path: Path) -> None:
    form = InputForm((96, 128), 20)
    save_checkpoint(tiny_network, tmp_path / "told.safetensors", form)
    save_checkpoint(tiny_network, tmp_path / "untold.safetensors")
    assert load_checkpoint(tmp_path / "told.safetensors").form == form
    assert load_checkpoint(tmp_path / "untold.safetensors").form is None


@pytest.mark.parametrize("told", ['{"image_hw": [96, 97], "prompt_length": 20}', '{"image_hw": 96}', "[]", '"x"'])
def test_an_invalid_input_form_is_refused(told: str, tiny_network: CausalCLIPSeg, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    described = json.dumps({**TINY.to_dict(), "trained_on": json.loads(told)})
    save_file(tiny_network.state_dict(), path, {"cclip-deploy checkpoint 1": described})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors has a config that this version cannot read"):
        load_checkpoint(path)
