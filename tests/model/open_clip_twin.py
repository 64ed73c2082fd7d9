"""open_clip's own CLIP in the sizes of one of our configs: the towers' oracle, and a file to start training from."""

from __future__ import annotations

import torch
from open_clip.model import CLIP

from cclip_deploy.model.config import ModelConfig


def open_clip_twin(config: ModelConfig, seed: int = 0) -> CLIP:
    """A random CLIP (quick-GELU) with the config's towers, in evaluation mode."""
    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=config.embed_dim,
        vision_cfg={
            "layers": list(config.vision_layers),
            "width": config.vision_width,
            "head_width": 32 * config.vision_width // config.vision_heads,
            "image_size": 32 * config.grid,
            "patch_size": None,
        },
        text_cfg={
            "context_length": config.context_length,
            "vocab_size": config.vocabulary_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
        quick_gelu=True,
    )
    return model.eval().requires_grad_(False)
