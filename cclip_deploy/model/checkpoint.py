"""Reading and writing checkpoints: ours (safetensors with the config inside) and the published layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError
from cclip_deploy.files import sha256_file, whole_file
from cclip_deploy.model.config import RN101, InputForm, ModelConfig
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.published import from_published, is_published_layout, list_names, to_published

FORMAT_FAMILY = "cclip-deploy checkpoint "
FORMAT = FORMAT_FAMILY + "1"
TRAINED_ON = "trained_on"
REASON_SHOWN = 90
# How torch's unpickler words its refusals of whatever is neither a tensor nor a container.
CODE_REFUSALS = ("GLOBAL", "Can only build", "Can only create", "Trying to call reduce")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network in evaluation mode, and where it came from."""

    model: CausalCLIPSeg
    layout: Literal["ours", "published"]
    path: Path
    sha256: str
    dropped: tuple[str, ...]
    form: InputForm | None = None
    """What it was trained on, where the file says so; the published layout does not."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def save_checkpoint(model: CausalCLIPSeg, path: Path, form: InputForm | None = None) -> None:
    """Write weights, config and input form to one safetensors file; an existing one is replaced whole or not at all."""
    trained_on = {} if form is None else {TRAINED_ON: form.to_dict()}
    # One key: safetensors writes several in any order.
    metadata = {FORMAT: json.dumps({**model.config.to_dict(), **trained_on})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(path) as unfinished:
        try:
            save_file(tensors, unfinished, metadata)
        except SafetensorError as error:  # how its own writer says that the disk did not take it
            raise EnvironmentProblem(
                f"Could not write {path}: {error}. Free some space or choose another folder."
            ) from error


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Load either layout, strictly: every live tensor must be there, once, in its shape.

    Raises:
        CheckpointError: the file is missing, truncated, of another network, or lacks tensors; the message names them.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}. Give the path of a .safetensors or .pth file.")
    config, form, tensors, layout, dropped = _read(path)
    model = _build(config, tensors, path, layout)
    return LoadedCheckpoint(model, layout, path, sha256_file(path), dropped, form)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors or a torch file, unwrapped, and the safetensors metadata (else empty)."""
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) == 16 and head[8:9] == b"{":
        return _read_safetensors(path)
    return _unwrap(_read_torch(path), path), {}


_Read = tuple[ModelConfig, InputForm | None, dict[str, Tensor], Literal["ours", "published"], tuple[str, ...]]


def _read(path: Path) -> _Read:
    tensors, metadata = read_tensors(path)
    written_as = next((key for key in metadata if key.startswith(FORMAT_FAMILY)), None)
    if written_as is not None:
        if written_as != FORMAT:
            raise CheckpointError(
                f"{path} is in the format {written_as!r}, and this version reads {FORMAT!r}. "
                "Install the cclip-deploy that wrote it, or save it again."
            )
        try:
            config, form = _parse(json.loads(metadata[FORMAT]))
        except (UsageError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} names a config that this version cannot read: {error}") from error
        blocks = sum(config.vision_layers) + config.text_layers
        if blocks > len(tensors):
            raise CheckpointError(
                f"{path} names a config of {blocks} blocks and holds {len(tensors)} tensors. Is it whole?"
            )
        return config, form, tensors, "ours", ()
    if is_published_layout(tensors):
        renamed, dropped = from_published(tensors, str(path))
        return RN101, None, renamed, "published", dropped
    raise CheckpointError(_describe_stranger(path, tensors))


def _parse(described: object) -> tuple[ModelConfig, InputForm | None]:
    if not isinstance(described, dict):
        raise UsageError("Not a model config: no table.")
    trained_on = described.pop(TRAINED_ON, None)
    return ModelConfig.from_dict(described), None if trained_on is None else InputForm.from_dict(trained_on)


def _describe_stranger(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("visual.") for name in tensors):
        return (
            f"{path} holds a CLIP network alone, without CausalCLIPSeg's neck and heads. "
            "It can start a training (clip weights), but it cannot be exported."
        )
    shown = list_names(list(tensors)) or "no tensors"
    return f"{path} is no CausalCLIPSeg checkpoint: it holds {shown}. Give one in our layout or the published one."


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        reason = str(error).splitlines()[0][:REASON_SHOWN]
        raise CheckpointError(
            f"{path} is a damaged or truncated safetensors file ({reason}). Copy it again."
        ) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # Of old pickle protocols and TorchScript archives: what is wrong with them comes as an error.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # damaged bytes make torch stumble over anything
        raise CheckpointError(f"{path} {_torch_refusal(str(error))}") from error


def _torch_refusal(message: str) -> str:
    """What torch's many lines about a file that it did not load come to."""
    if "TorchScript" in message:
        return "is a TorchScript archive, a program: refused. Save its weights alone: torch.save(state_dict, FILE)."
    if any(words in message for words in CODE_REFUSALS):
        return (
            "holds more than tensors, so loading it could run code: refused. "
            "Save the state dict alone: torch.save(model.state_dict(), FILE)."
        )
    reason = (message.rpartition("WeightsUnpickler error:")[2].strip() or "it ends early").splitlines()[0]
    return (
        f"is no checkpoint, or a damaged or truncated one ({reason[:REASON_SHOWN]}). "
        "Copy it again, or give a .safetensors or .pth file."
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """Take a training script's wrapping off: {"state_dict": …} around, "module." before every name."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict. Save model.state_dict().")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if len(tensors) != len(loaded):
        others = [str(name) for name in loaded if str(name) not in tensors]
        raise CheckpointError(f"{path}: {list_names(others)} are no tensors. Save model.state_dict() alone.")
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _build(config: ModelConfig, tensors: dict[str, Tensor], path: Path, layout: str) -> CausalCLIPSeg:
    with torch.device("meta"):
        model = CausalCLIPSeg(config)
    wanted = model.state_dict()
    name_of = to_published if layout == "published" else str
    _refuse(path, "lacks {}", [name_of(name) for name in wanted if name not in tensors])
    _refuse(path, "holds {} too many", [name_of(name) for name in tensors if name not in wanted])
    misshaped = [
        f"{name_of(name)} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if tensors[name].shape != wanted[name].shape
    ]
    _refuse(path, "has {} of another shape", misshaped)
    # Copies, because both readers map the file: whoever wrote it again would change or crash a network in use.
    cast = {
        name: tensor.to(wanted[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    _refuse(path, "has {} with values that are not finite", [
        name_of(name) for name, tensor in cast.items() if tensor.is_floating_point() and not _is_finite(tensor)
    ])  # fmt: skip
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def _is_finite(tensor: Tensor) -> bool:
    # Extremes carry NaN and infinity along, in one pass without a mask as large as the tensor.
    return all(value.isfinite() for value in tensor.aminmax())


def _refuse(path: Path, what: str, names: list[str]) -> None:
    if names:
        count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
        raise CheckpointError(f"{path} {what.format(count)}: {list_names(names)}. Is it whole, and of this network?")
