"""The text tower with plain matrix products, and a finite causal mask that half precision can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cclip_deploy.errors import PromptError
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.towers import TextTower

# exp(-30000) is exactly zero in float32, as exp(-inf) is, and float16 can hold the number.
MASKED = -30000.0


class PlainAttention(nn.Module):
    """Multi-head self-attention of one length under a constant causal mask, as products and a softmax."""

    mask: Tensor

    def __init__(self, attention: nn.MultiheadAttention, mask: Tensor) -> None:
        super().__init__()
        self.heads = attention.num_heads
        width = attention.embed_dim
        scale = torch.ones(3 * width, 1, dtype=torch.float64)
        scale[:width] = (width // self.heads) ** -0.5
        dtype = attention.in_proj_weight.dtype
        weight, bias = attention.in_proj_weight.double() * scale, attention.in_proj_bias.double() * scale[:, 0]
        self.project = nn.Linear(width, 3 * width, device="meta")
        self.project.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.project.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        self.out = attention.out_proj
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # (P, L, 512) -> (P, L, 512)
        _, length, width = x.shape
        query, key, value = self.project(x).reshape(-1, length, 3, self.heads, width // self.heads).unbind(2)
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) + self.mask  # (P, heads, L, L)
        mixed = (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.out(mixed.reshape(-1, length, width))
        return out


class PlainTextTower(nn.Module):
    """TextTower for prompts of one length."""

    position: Tensor

    def __init__(self, tower: TextTower, length: int) -> None:
        super().__init__()
        dtype = tower.positional_embedding.dtype
        self.embed = tower.token_embedding
        self.register_buffer("position", tower.positional_embedding[:length].detach())
        mask = torch.full((length, length), MASKED, dtype=dtype).triu(1)
        self.blocks = nn.ModuleList(tower.transformer.resblocks)
        self.attentions = nn.ModuleList(PlainAttention(block.attn, mask) for block in tower.transformer.resblocks)
        self.norm = tower.ln_final
        self.projection = tower.text_projection

    def forward(self, tokens: Tensor) -> Tensor:  # (P, L) -> (P, 512)
        x = self.embed(tokens) + self.position
        blocks: list[Any] = list(self.blocks)  # open_clip's are untyped
        for block, attention in zip(blocks, self.attentions, strict=True):
            x = x + attention(block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        end = tokens.to(torch.int32).argmax(dim=1)
        last = x.gather(1, end.reshape(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)
        state: Tensor = self.norm(last) @ self.projection
        return state


class FixPromptLength(Rewrite[TextTower]):
    """TextTower -> PlainTextTower for prompts of one length; the final norm is taken at the end token alone."""

    def __init__(self, length: int) -> None:
        self.length = length
        if length < 2:
            raise PromptError(f"A prompt length of {length} leaves no room for start and end. Use 32, for example.")

    def refusal(self, module: TextTower) -> str | None:
        longest = module.positional_embedding.shape[0]
        return None if self.length <= longest else f"{self.length} tokens are more than the tower's {longest}"

    def replacement(self, module: TextTower) -> nn.Module:
        return PlainTextTower(module, self.length)
