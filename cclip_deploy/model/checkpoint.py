"""Read and write checkpoints: safetensors with the config in the metadata, or the published layout (read only)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from cclip_deploy.common.files import whole_file
from cclip_deploy.errors import CheckpointError, EnvironmentIssue, UsageError
from cclip_deploy.model.config import RN101, InputForm, ModelConfig
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.published import from_published, is_published_layout, list_names, to_published

FORMAT_FAMILY = "cclip-deploy checkpoint "
FORMAT = FORMAT_FAMILY + "1"
TRAINED_ON = "trained_on"
REASON_SHOWN = 90
CHECKPOINT_BYTES = 16 * 2**30
PROGRAM_BYTES = 16 * 2**20
"""Allowance for the compressed code in a TorchScript archive, which is refused later with a message of its own."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COUNTS = (torch.int64, torch.int32)
# Phrases in the errors of torch's unpickler for objects that are neither tensors nor containers.
CODE_REFUSALS = ("GLOBAL", "Can only build", "Can only create", "Trying to call reduce")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network in evaluation mode and its origin.

    Attributes:
        model: the network.
        layout: "ours" for this package's format.
        path: checkpoint file.
        sha256: hex digest of the file.
        dropped: published names of unused tensors.
        form: input sizes of training; None if the file does not store them (published layout).
    """

    model: CausalCLIPSeg
    layout: Literal["ours", "published"]
    path: Path
    sha256: str
    dropped: tuple[str, ...]
    form: InputForm | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def save_checkpoint(model: CausalCLIPSeg, path: Path, form: InputForm | None = None) -> None:
    """Write weights, config and input form to a safetensors file, replacing an existing one atomically."""
    trained_on = {} if form is None else {TRAINED_ON: form.to_dict()}
    # A single key, because safetensors does not keep the order of several.
    metadata = {FORMAT: json.dumps({**model.config.to_dict(), **trained_on})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(path) as unfinished:
        try:
            save_file(tensors, unfinished, metadata)
        except SafetensorError as error:  # raised for I/O errors
            raise EnvironmentIssue(
                f"Could not write {path}: {error}. Free some space or choose another folder."
            ) from error


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Load a checkpoint of either layout; every tensor must be present and have the right shape and type.

    Raises:
        CheckpointError: the file is missing, damaged, of another network, or lacks tensors; the message names them.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}. Give the path of a .safetensors or .pth file.")
    content = _content_of(path)
    sha256 = hashlib.sha256(content).hexdigest()
    config, form, tensors, layout, dropped = _read(content, path)
    del content
    return LoadedCheckpoint(_build(config, tensors, path, layout), layout, path, sha256, dropped, form)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors or torch file; raises like `load_checkpoint`."""
    return _tensors_in(_content_of(path), path)[0]


def _content_of(path: Path) -> bytes:
    """Read a whole file. It is not memory-mapped: truncating a mapped file would crash the process."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > CHECKPOINT_BYTES:
                raise CheckpointError(f"{path} has {size:,} bytes; the limit is {CHECKPOINT_BYTES:,}.")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Check its permissions and the disk."
        ) from error


def _tensors_in(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata (empty unless the file is safetensors)."""
    if len(content) >= 16 and content[8:9] == b"{":
        return _in_safetensors(content, path)
    return _unwrap(_in_torch(content, path), path), {}


_Read = tuple[ModelConfig, InputForm | None, dict[str, Tensor], Literal["ours", "published"], tuple[str, ...]]


def _read(content: bytes, path: Path) -> _Read:
    tensors, metadata = _tensors_in(content, path)
    written_as = next((key for key in metadata if key.startswith(FORMAT_FAMILY)), None)
    if written_as is not None:
        if written_as != FORMAT:
            raise CheckpointError(
                f"{path} has the format {written_as!r}, but this version reads {FORMAT!r}. "
                "Install the version of cclip-deploy that wrote it, or save it again."
            )
        try:
            config, form = _parse(json.loads(metadata[FORMAT]))
        except (UsageError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a config that this version cannot read: {error}") from error
        blocks = sum(config.vision_layers) + config.text_layers
        if blocks > len(tensors):
            raise CheckpointError(
                f"{path} has a config of {blocks} blocks but only {len(tensors)} tensors. Is the file complete?"
            )
        return config, form, tensors, "ours", ()
    if is_published_layout(tensors):
        renamed, dropped = from_published(tensors, str(path))
        return RN101, None, renamed, "published", dropped
    raise CheckpointError(_describe_unknown(path, tensors))


def _parse(described: object) -> tuple[ModelConfig, InputForm | None]:
    if not isinstance(described, dict):
        raise UsageError("Not a model config: not an object.")
    trained_on = described.pop(TRAINED_ON, None)
    return ModelConfig.from_dict(described), None if trained_on is None else InputForm.from_dict(trained_on)


def _describe_unknown(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("visual.") for name in tensors):
        return (
            f"{path} is a CLIP network without CausalCLIPSeg's neck and heads. "
            "It can initialize a training (clip weights), but it cannot be exported."
        )
    shown = list_names(list(tensors)) or "no tensors"
    return (
        f"{path} is not a CausalCLIPSeg checkpoint: it has {shown}. Give a checkpoint of cclip-deploy or in the "
        "published layout."
    )


def _in_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = load_safetensors(content)  # validates the header, which is parsed again for its metadata
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return dict(sorted(tensors.items())), header.get("__metadata__") or {}
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        reason = str(error).splitlines()[0][:REASON_SHOWN]
        raise CheckpointError(
            f"{path} is a damaged or truncated safetensors file ({reason}). Copy it again."
        ) from error


def _in_torch(content: bytes, path: Path) -> object:
    _refuse_compressed(content, path)
    try:
        with warnings.catch_warnings():
            # Old pickle protocols and TorchScript archives warn before they raise an error.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything on damaged bytes
        raise CheckpointError(f"{path} {_torch_refusal(str(error))}") from error


def _torch_refusal(message: str) -> str:
    """Summarize torch's error message about a file that it refused."""
    if "TorchScript" in message:
        return (
            "is a TorchScript archive, which contains code: refused. "
            "Save only the weights: torch.save(state_dict, FILE)."
        )
    if any(words in message for words in CODE_REFUSALS):
        return (
            "contains objects other than tensors, so loading it could run code: refused. "
            "Save only the state dict: torch.save(model.state_dict(), FILE)."
        )
    reason = (message.rpartition("WeightsUnpickler error:")[2].strip() or "it ends early").splitlines()[0]
    return (
        f"is not a checkpoint, or a damaged or truncated one ({reason[:REASON_SHOWN]}). "
        "Copy it again, or give a .safetensors or .pth file."
    )


def _refuse_compressed(content: bytes, path: Path) -> None:
    """Raise CheckpointError for an archive that unpacks to much more than its size; torch stores uncompressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            unpacked = sum(member.file_size for member in file.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load reports it
    if unpacked > len(content) + PROGRAM_BYTES:
        raise CheckpointError(f"{path} is not a checkpoint: it unpacks to {unpacked:,} bytes. Save it with torch.save.")


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """Unwrap {"state_dict": …} and remove the "module." prefix of training scripts."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} contains a {type(loaded).__name__}, not a state dict. Save model.state_dict().")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if len(tensors) != len(loaded):
        others = [str(name) for name in loaded if str(name) not in tensors]
        raise CheckpointError(f"{path}: {list_names(others)} are not tensors. Save only model.state_dict().")
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
    refuse_types(path, tensors, wanted, name_of)
    # Copy one at a time: tensors of a torch file may share memory.
    cast = {
        name: tensors.pop(name).to(wanted[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name in wanted
    }
    _refuse(path, "has {} with values that are not finite", [
        name_of(name) for name, tensor in cast.items() if tensor.is_floating_point() and not _is_finite(tensor)
    ])  # fmt: skip
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def refuse_types(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    name_of: Callable[[str], str] = str,
) -> None:
    """Raise CheckpointError for tensors of a dtype or layout that weights and counters cannot have.

    Args:
        path: file, for the message.
        tensors: tensors to check.
        wanted: the network's tensors, with the same names.
        name_of: maps names to those in the message.
    """
    _refuse(path, "has {} of another type", [
        f"{name_of(name)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if tensor.dtype not in (FLOATS if wanted[name].is_floating_point() else COUNTS)
        or tensor.layout is not torch.strided
    ])  # fmt: skip


def _is_finite(tensor: Tensor) -> bool:
    # Minimum and maximum propagate NaN and infinity, without a mask as large as the tensor.
    return all(value.isfinite() for value in tensor.aminmax())


def _refuse(path: Path | str, what: str, names: list[str]) -> None:
    if names:
        count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
        raise CheckpointError(
            f"{path} {what.format(count)}: {list_names(names)}. Is the file complete, and of this network?"
        )
