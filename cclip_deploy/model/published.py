"""The published checkpoint layout: which of its names is which of ours, and which it carries in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cclip_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Published prefix -> ours. Longer prefixes first, because the first match decides.
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
        f"neck_ad.masker{level}.{theirs}.": f"neck.masker{level}.{ours}."
        for level in (3, 4, 5)
        for theirs, ours in (
            ("coordconv.conv1", "locate.block"),
            ("conv2", "mix"),
            ("coordconv2.conv1", "relocate.block"),
            ("conv", "score"),
            ("bn", "norm"),
        )
    },
    **{
        f"{theirs}.{part}.": f"{ours}.{name}."
        for theirs, ours in (("proj", "head"), ("proj_ad", "confounding_head"))
        for part, name in (("vis.1", "block1"), ("vis.3", "block2"), ("vis.4", "mix"), ("txt", "prompt"))
    },
}

# Modules of the published neck that its forward pass never runs: 59 tensors.
DEAD_PREFIXES = tuple(
    f"neck_ad.{name}."
    for name in (
        "txt_proj", "f1_v_proj", "norm_layer", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj3", "coordconv",
    )
)  # fmt: skip
NAMES_SHOWN = 6
NAME_LENGTH_SHOWN = 100
# CLIP's contrastive temperature: segmentation has no use for it.
DEAD_KEYS = ("backbone.logit_scale",)

IMAGE_TOWERS = {
    (3, 4, 6, 3): "RN50",
    (3, 4, 23, 3): "RN101",
    (4, 6, 10, 6): "RN50x4",
    (6, 8, 18, 8): "RN50x16",
    (3, 15, 36, 10): "RN50x64",
}
VISION_TRANSFORMER = "a vision transformer (ViT)"
# What cannot be told from the names, a tower with some blocks missing say, is left to the check of every tensor.
OTHER_TOWERS = {VISION_TRANSFORMER, *IMAGE_TOWERS.values()} - {"RN101"}


def is_published_layout(keys: Iterable[str]) -> bool:
    """Whether the names look like the published network's, in whole or in part."""
    return any(key.startswith(("backbone.", "neck_ad.", "proj_ad.")) for key in keys)


def is_dead(key: str) -> bool:
    """Whether the published network carries this tensor without ever using it."""
    return key in DEAD_KEYS or key.startswith(DEAD_PREFIXES)


def our_name(key: str) -> str | None:
    """Our name of a published tensor; None for one that the published network does not have."""
    for theirs, ours in PREFIXES.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return None


def image_tower_name(keys: Iterable[str]) -> str:
    """What CLIP calls the image tower whose `visual.` tensors these are."""
    names = list(keys)
    if any("visual.class_embedding" in name for name in names):
        return VISION_TRANSFORMER
    blocks = tuple(
        len({name.split(f"visual.layer{stage}.")[1].split(".")[0] for name in names if f"visual.layer{stage}." in name})
        for stage in (1, 2, 3, 4)
    )
    return IMAGE_TOWERS.get(blocks, f"a ResNet with {blocks} blocks")  # type: ignore[arg-type]


def from_published(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename the tensors of a published checkpoint to ours.

    Returns:
        The live tensors under our names, and the published names of those that were dropped.

    Raises:
        CheckpointError: the image tower is not RN101, or a name is none of the published network's.
    """
    tower = image_tower_name(tensors)
    if tower in OTHER_TOWERS:
        raise CheckpointError(
            f"{source} was trained on CLIP {tower}; the published CausalCLIPSeg has an RN101 image tower "
            "(its neck needs a 512-wide embedding). Train on RN101, or export an RN101 checkpoint."
        )
    dropped = tuple(key for key in tensors if is_dead(key))
    renamed: dict[str, Tensor] = {}
    strangers: list[str] = []
    for key, tensor in tensors.items():
        if is_dead(key):
            continue
        name = our_name(key)
        if name is None:
            strangers.append(key)
        else:
            renamed[name] = tensor
    if strangers:
        raise CheckpointError(
            f"{source} holds what the published network does not have: {list_names(strangers)}. "
            "Is it a checkpoint of another network?"
        )
    return renamed, dropped


def list_names(names: Sequence[str]) -> str:
    """The first few names of a file for a message of one line, whatever characters they are made of."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:NAMES_SHOWN]]
    return ", ".join(name[:NAME_LENGTH_SHOWN] for name in shown) + (" …" if len(names) > NAMES_SHOWN else "")


def to_published(name: str) -> str:
    """The published name of one of our tensors, for messages about published checkpoints."""
    for theirs, ours in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)
