"""Tensor names of published checkpoints: the mapping to this network's names, and the unused keys that are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cclip_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Published prefix -> prefix in this network. Longer prefixes first, because the first match is used.
PREFIXES = {
    "backbone.visual.": "image_tower.",
    "backbone.": "text_tower.",
    "neck_ad.f2_v_proj.": "neck.project4.",
    "neck_ad.f4_proj4.": "neck.refine4.",
    "neck_ad.carafe.down.": "neck.carafe.compress.",
    "neck_ad.carafe.encoder.": "neck.carafe.encode.",
    "neck_ad.carafe.out.": "neck.carafe.out.",
    "neck_ad.aggr.": "neck.aggregate.",
    **{
        f"neck_ad.masker{level}.{published}.": f"neck.masker{level}.{own}."
        for level in (3, 4, 5)
        for published, own in (
            ("coordconv.conv1", "locate.block"),
            ("conv2", "mix"),
            ("coordconv2.conv1", "relocate.block"),
            ("conv", "score"),
            ("bn", "norm"),
        )
    },
    **{
        f"{published}.{part}.": f"{own}.{name}."
        for published, own in (("proj", "head"), ("proj_ad", "confounding_head"))
        for part, name in (("vis.1", "block1"), ("vis.3", "block2"), ("vis.4", "mix"), ("txt", "prompt"))
    },
}

# Modules of the published neck that its forward pass does not use: 59 tensors.
UNUSED_PREFIXES = tuple(
    f"neck_ad.{name}."
    for name in (
        "txt_proj", "f1_v_proj", "norm_layer", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj3", "coordconv",
    )
)  # fmt: skip
NAMES_SHOWN = 6
NAME_LENGTH_SHOWN = 100
# CLIP's contrastive temperature, not used for segmentation.
UNUSED_KEYS = ("backbone.logit_scale",)

IMAGE_TOWERS = {
    (3, 4, 6, 3): "RN50",
    (3, 4, 23, 3): "RN101",
    (4, 6, 10, 6): "RN50x4",
    (6, 8, 18, 8): "RN50x16",
    (3, 15, 36, 10): "RN50x64",
}
VISION_TRANSFORMER = "a vision transformer (ViT)"
# Incomplete towers are not recognized here; the check of every tensor reports them.
OTHER_TOWERS = {VISION_TRANSFORMER, *IMAGE_TOWERS.values()} - {"RN101"}


def is_published_layout(keys: Iterable[str]) -> bool:
    """Return whether any name is one of the published network."""
    return any(key.startswith(("backbone.", "neck_ad.", "proj_ad.")) for key in keys)


def is_unused(key: str) -> bool:
    """Return whether the published network has this tensor but does not use it."""
    return key in UNUSED_KEYS or key.startswith(UNUSED_PREFIXES)


def network_name(key: str) -> str | None:
    """Return this network's name of a published tensor, or None if the published network has no such tensor."""
    for published, own in PREFIXES.items():
        if key.startswith(published):
            return own + key[len(published) :]
    return None


def image_tower_name(keys: Iterable[str]) -> str:
    """Return CLIP's name of the image tower that has these `visual.` tensors."""
    names = list(keys)
    if any("visual.class_embedding" in name for name in names):
        return VISION_TRANSFORMER
    blocks = tuple(
        len({name.split(f"visual.layer{stage}.")[1].split(".")[0] for name in names if f"visual.layer{stage}." in name})
        for stage in (1, 2, 3, 4)
    )
    return IMAGE_TOWERS.get(blocks, f"a ResNet with {blocks} blocks")  # type: ignore[arg-type]


def from_published(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename the tensors of a published checkpoint to this network's names.

    Returns:
        The renamed tensors, and the published names of the dropped ones.

    Raises:
        CheckpointError: the image tower is not RN101, or the published network has no tensor of some name.
    """
    tower = image_tower_name(tensors)
    if tower in OTHER_TOWERS:
        raise CheckpointError(
            f"{source} was trained on CLIP {tower}; the published CausalCLIPSeg has an RN101 image tower "
            "(its neck needs a 512-wide embedding). Train on RN101, or export an RN101 checkpoint."
        )
    dropped = tuple(key for key in tensors if is_unused(key))
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if is_unused(key):
            continue
        name = network_name(key)
        if name is None:
            unknown.append(key)
        else:
            renamed[name] = tensor
    if unknown:
        raise CheckpointError(
            f"{source} has tensors that the published network does not have: {list_names(unknown)}. "
            "Is it a checkpoint of another network?"
        )
    return renamed, dropped


def list_names(names: Sequence[str]) -> str:
    """Format the first few tensor names of a file on one line, with unprintable characters escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:NAMES_SHOWN]]
    return ", ".join(name[:NAME_LENGTH_SHOWN] for name in shown) + (" …" if len(names) > NAMES_SHOWN else "")


def to_published(name: str) -> str:
    """Return the published name of a tensor of this network, for messages."""
    for published, own in PREFIXES.items():
        if name.startswith(own):
            return published + name[len(own) :]
    raise KeyError(name)
