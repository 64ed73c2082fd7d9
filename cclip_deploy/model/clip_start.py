"""Initialize the towers from CLIP's weights before training."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import open_clip
from torch import Tensor

from cclip_deploy.errors import CheckpointError, EnvironmentIssue
from cclip_deploy.model.checkpoint import read_tensors, refuse_types
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.published import image_tower_name, list_names

ARCHITECTURE = "RN101-quickgelu"
LONGEST_WAIT_S = 4.0
CACHED_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# The residual around the attention pool, which CLIP does not have.
RESIDUAL = "image_tower.attnpool.connect."
# Used in training only, and absent from old files.
COUNTER = ".num_batches_tracked"
# The contrastive temperature, and sizes that OpenAI's files store as tensors.
NOT_TOWERS = ("logit_scale", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class ClipStart:
    """Names of the tower tensors that were loaded from CLIP, and of those that CLIP does not have."""

    found: tuple[str, ...]
    missing: tuple[str, ...]


def load_clip_weights(model: CausalCLIPSeg, source: str) -> ClipStart:
    """Load CLIP's weights into both towers, in place.

    Args:
        model: network to initialize.
        source: a `pretrained` name of open_clip, which downloads it, or a local file.

    Raises:
        CheckpointError: the file is not a CLIP network, or its sizes differ from the towers.
        EnvironmentIssue: open_clip could not download the weights.
    """
    tensors = _read_clip(source)
    renamed = {
        ("image_tower." + name.removeprefix("visual.") if name.startswith("visual.") else "text_tower." + name): tensor
        for name, tensor in tensors.items()
        if name not in NOT_TOWERS
    }
    towers = {name: t for name, t in model.state_dict().items() if name.startswith(("image_tower.", "text_tower."))}
    unfit = [name for name in renamed if name not in towers or towers[name].shape != renamed[name].shape]
    if unfit:
        raise CheckpointError(
            f"{source} is CLIP {image_tower_name(tensors)}, whose tensors do not fit config {model.config.name!r} "
            f"({list_names(unfit)}). Give weights of {ARCHITECTURE}."
        )
    missing = tuple(name for name in towers if name not in renamed)
    unexpected = [name for name in missing if not name.startswith(RESIDUAL) and not name.endswith(COUNTER)]
    if unexpected:
        raise CheckpointError(f"{source} lacks {list_names(unexpected)}, which CLIP has. Is the file complete?")
    refuse_types(source, renamed, towers)
    model.load_state_dict({name: t.to(towers[name].dtype) for name, t in renamed.items()}, strict=False)
    return ClipStart(tuple(renamed), missing)


def check_clip_source(source: str) -> None:
    """Check within five seconds that weights can be read or downloaded, before any other work.

    Raises:
        CheckpointError: the source is neither a file nor a name of open_clip.
        EnvironmentIssue: the weights are not in open_clip's cache, and their server cannot be reached.
    """
    if source not in _names():
        _require_file(source)
        return
    address = huggingface_hub.constants.ENDPOINT
    if _is_cached(source) or _answers(address):
        return
    raise EnvironmentIssue(
        f"{ARCHITECTURE} {source!r} is not in the cache, and {address} could not be reached within "
        f"{LONGEST_WAIT_S:.0f} s. Download the weights elsewhere and give the file: --clip-weights FILE."
    )


def _is_cached(name: str) -> bool:
    repository = open_clip.pretrained.get_pretrained_cfg(ARCHITECTURE, name)["hf_hub"].rstrip("/")
    found = (huggingface_hub.try_to_load_from_cache(repository, file) for file in CACHED_FILES)
    return any(isinstance(path, str) for path in found)


def _answers(address: str) -> bool:
    """Return whether a server answers in time; in a thread, because looking up its name has no time limit."""
    answered = threading.Event()

    def request() -> None:
        try:
            urllib.request.urlopen(address, timeout=LONGEST_WAIT_S).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass
        finally:
            finished.set()

    finished = threading.Event()
    threading.Thread(target=request, daemon=True).start()
    finished.wait(LONGEST_WAIT_S)
    return answered.is_set()


def _names() -> list[str]:
    return open_clip.list_pretrained_tags_by_model(ARCHITECTURE)  # type: ignore[no-any-return]


def _require_file(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(
            f"{source!r} is neither a file nor one of open_clip's weights for {ARCHITECTURE}: {_names()}."
        )
    return path


def _read_clip(source: str) -> Mapping[str, Tensor]:
    if source in _names():
        try:
            return open_clip.create_model(ARCHITECTURE, pretrained=source).state_dict()  # type: ignore[no-any-return]
        except (OSError, RuntimeError) as error:
            raise EnvironmentIssue(
                f"open_clip could not fetch {ARCHITECTURE} {source!r}: {error}. Download the file and give its path."
            ) from error
    path = _require_file(source)
    tensors = read_tensors(path)
    if not any(name.startswith("visual.") for name in tensors):
        raise CheckpointError(f"{source} is not a CLIP network (no tensor is named visual.…).")
    return tensors
