"""Initialize the towers from CLIP's weights before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import open_clip
from torch import Tensor

from cclip_deploy.errors import CheckpointError, EnvironmentIssue
from cclip_deploy.model.checkpoint import read_tensors, refuse_types
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.published import image_tower_name, list_names

ARCHITECTURE = "RN101-quickgelu"
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


def _read_clip(source: str) -> Mapping[str, Tensor]:
    names = open_clip.list_pretrained_tags_by_model(ARCHITECTURE)
    if source in names:
        try:
            return open_clip.create_model(ARCHITECTURE, pretrained=source).state_dict()  # type: ignore[no-any-return]
        except (OSError, RuntimeError) as error:
            raise EnvironmentIssue(
                f"open_clip could not fetch {ARCHITECTURE} {source!r}: {error}. Download the file and give its path."
            ) from error
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(
            f"{source!r} is neither a file nor one of open_clip's weights for {ARCHITECTURE}: {names}."
        )
    tensors = read_tensors(path)
    if not any(name.startswith("visual.") for name in tensors):
        raise CheckpointError(f"{source} is not a CLIP network (no tensor is named visual.…).")
    return tensors
