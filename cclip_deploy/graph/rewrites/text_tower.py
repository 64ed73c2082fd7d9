"""Text tower with attention as plain matrix products and a finite causal mask that float16 can represent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cclip_deploy.errors import PromptError
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.towers import TextTower

# exp(-30000) is exactly zero in float32, like exp(-inf), and float16 can represent -30000.
MASKED = -30000.0


class PlainAttention(nn.Module):
    """Multi-head attention as products and a softmax, with queries at some positions and keys and values at all."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        width = attention.embed_dim
        scale = (width // self.heads) ** -0.5
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.query = _linear(weight[:width].double() * scale, bias[:width].double() * scale, weight.dtype)
        self.key_and_value = _linear(weight[width:], bias[width:], weight.dtype)
        self.out = attention.out_proj

    def forward(self, queried: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Queries from (P, R, 512), keys and values from x (P, L, 512), mask for (P, heads, R, L) -> (P, R, 512)."""
        _, rows, width = queried.shape
        _, length, _ = x.shape
        per_head = width // self.heads
        query = self.query(queried).reshape(-1, rows, self.heads, per_head).transpose(1, 2)
        key, value = self.key_and_value(x).reshape(-1, length, 2, self.heads, per_head).unbind(2)
        scores = query @ key.permute(0, 2, 3, 1) + mask  # (P, heads, R, L)
        mixed = (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.out(mixed.reshape(-1, rows, width))
        return out


class PlainTextTower(nn.Module):
    """TextTower for prompts of one length; the last block computes the end token alone, because only it is read."""

    position: Tensor
    mask: Tensor

    def __init__(self, tower: TextTower, length: int) -> None:
        super().__init__()
        dtype = tower.positional_embedding.dtype
        self.embed = tower.token_embedding
        self.register_buffer("position", tower.positional_embedding[:length].detach())
        self.register_buffer("mask", torch.full((length, length), MASKED, dtype=dtype).triu(1))
        self.blocks = nn.ModuleList(tower.transformer.resblocks)
        self.attentions = nn.ModuleList(PlainAttention(block.attn) for block in tower.transformer.resblocks)
        self.norm = tower.ln_final
        self.projection = tower.text_projection

    def forward(self, tokens: Tensor) -> Tensor:  # (P, L) -> (P, 512)
        x = self.embed(tokens) + self.position
        blocks: list[Any] = list(self.blocks)  # open_clip's blocks are untyped
        for number, (block, attention) in enumerate(zip(blocks, self.attentions, strict=True), start=1):
            normed, mask = block.ln_1(x), self.mask
            queried = normed
            if number == len(blocks):
                end = tokens.to(torch.int32).argmax(dim=1)
                mask = self.mask[end].reshape(-1, 1, 1, len(self.mask))
                x, queried = _row(x, end), _row(normed, end)
            x = x + attention(queried, normed, mask)
            x = x + block.mlp(block.ln_2(x))
        state: Tensor = self.norm(x.squeeze(1)) @ self.projection
        return state


def _row(x: Tensor, number: Tensor) -> Tensor:
    """Select one row for each prompt: (P, L, 512) and row numbers (P,) -> (P, 1, 512)."""
    return x.gather(1, number.reshape(-1, 1, 1).expand(-1, 1, x.shape[2]))


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer


class FixPromptLength(Rewrite[TextTower]):
    """TextTower -> PlainTextTower for prompts of one length."""

    def __init__(self, length: int) -> None:
        self.length = length
        if length < 2:
            raise PromptError(f"The prompt length must be at least 2, got {length}; 32 is usual.")

    def refusal(self, module: TextTower) -> str | None:
        longest = module.positional_embedding.shape[0]
        return None if self.length <= longest else f"{self.length} tokens are more than the tower's {longest}"

    def replacement(self, module: TextTower) -> nn.Module:
        return PlainTextTower(module, self.length)
