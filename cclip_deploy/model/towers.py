"""CLIP's image and text towers, built on open_clip: ModifiedResNet with dense attention pool, and text transformer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.errors import PromptError
from cclip_deploy.model.config import STRIDE, ModelConfig, check_image_hw


class ImagePyramid(NamedTuple):
    """The three feature maps of the image tower; channel counts are those of rn101."""

    v3: Tensor  # (B, 512, H/8, W/8)
    v4: Tensor  # (B, 1024, H/16, W/16)
    v5: Tensor  # (B, 512, H/32, W/32)


class DenseAttentionPool(nn.Module):
    """CLIP's attention pool with a query at every position instead of the mean, and a residual connection."""

    def __init__(self, grid: int, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) / width**0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out_width)
        self.connect = nn.Sequential(nn.Conv2d(width, out_width, 1, bias=False), nn.BatchNorm2d(out_width))

    def embedding(self, hw: tuple[int, int]) -> Tensor:
        """Return the positional embedding without its class row, resized bicubically: (1, width, h, w)."""
        square = self.positional_embedding[1:].T.reshape(1, -1, self.grid, self.grid)
        if hw == (self.grid, self.grid):
            return square
        return functional.interpolate(square, size=hw, mode="bicubic", align_corners=False)

    def double_embedding(self, hw: tuple[int, int]) -> Tensor:
        """Return the resized embedding in float64: (h * w, width)."""
        return self.embedding(hw).double().flatten(2).squeeze(0).T

    def forward(self, x: Tensor) -> Tensor:  # (B, 2048, h, w) -> (B, 512, h, w)
        batch, channels, height, width = x.shape
        z = (x + self.embedding((height, width))).flatten(2).transpose(1, 2)  # (B, hw, 2048)
        query, key, value = (
            projection(z).reshape(batch, height * width, self.heads, channels // self.heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, hw, 64)
        weights = (query * (channels // self.heads) ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        pooled = (weights @ value).transpose(1, 2).reshape(batch, height * width, channels)
        pooled = self.c_proj(pooled).transpose(1, 2).reshape(batch, -1, height, width)
        return functional.relu(pooled + self.connect(x))


class ImageTower(ModifiedResNet):  # type: ignore[misc]  # open_clip is untyped
    """open_clip's ModifiedResNet that returns its last three maps, with a dense attention pool."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            layers=list(config.vision_layers),
            output_dim=config.embed_dim,
            heads=config.vision_heads,
            image_size=config.grid * STRIDE,
            width=config.vision_width,
        )
        self.attnpool = DenseAttentionPool(config.grid, 32 * config.vision_width, config.vision_heads, config.embed_dim)
        self.init_parameters()

    def forward(self, image: Tensor) -> ImagePyramid:
        check_image_hw((image.shape[-2], image.shape[-1]))
        x = self.layer1(self.stem(image))  # (B, 256, H/4, W/4)
        v3 = self.layer2(x)
        v4 = self.layer3(v3)
        v5 = self.attnpool(self.layer4(v4))
        return ImagePyramid(v3, v4, v5)


class TextTower(nn.Module):
    """CLIP's text transformer for prompts up to the context length; returns the embedding at the end token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))
        self.transformer = Transformer(
            width=config.text_width,
            layers=config.text_layers,
            heads=config.text_heads,
            act_layer=QuickGELU,
            norm_layer=LayerNorm,
        )
        self.ln_final = LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))
        self._initialize(config)

    def _initialize(self, config: ModelConfig) -> None:
        """CLIP's initialization (Radford et al. 2021, section 2.4 and its released code's scales)."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=config.text_width**-0.5)
        attention_std = config.text_width**-0.5
        residual_std = attention_std * (2 * config.text_layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=attention_std)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * config.text_width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) int64 or int32 -> (B, 512)
        length = tokens.shape[1]
        if length > self.positional_embedding.shape[0]:
            raise PromptError(
                f"{length} tokens exceed the text tower's limit of {self.positional_embedding.shape[0]}. Shorten the "
                "prompt."
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (B, L, 512)
        mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        end = tokens.argmax(dim=-1)
        state: Tensor = x[torch.arange(len(x), device=x.device), end] @ self.text_projection
        return state
