"""The dense attention pool with all its products of x in one, and its positional embedding a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.towers import DenseAttentionPool


class FixedAttentionPool(nn.Module):
    """Queries, keys, values and the residual are one product of x plus a constant map: W(x + E) = Wx + WE."""

    place: Tensor

    def __init__(self, weight: Tensor, place: Tensor, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (2048, 3 * 2048 + 512)
        self.register_buffer("place", place)  # (1, h * w, 3 * 2048 + 512)
        self.out = out
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:  # (B, 2048, h, w) -> (B, 512, h, w)
        _, width, height, breadth = x.shape
        positions = height * breadth
        rows = x.reshape(-1, width, positions).transpose(1, 2)  # (B, hw, 2048)
        product = rows @ self.weight + self.place
        query, key, value, residual = torch.split(product, [width, width, width, self.out.out_features], dim=2)
        per_head = (-1, positions, self.heads, width // self.heads)
        query, value = query.reshape(per_head).transpose(1, 2), value.reshape(per_head).transpose(1, 2)
        weights = (query @ key.reshape(per_head).permute(0, 2, 3, 1)).softmax(dim=-1)  # (B, heads, hw, hw)
        pooled = (weights @ value).transpose(1, 2).reshape(-1, positions, width)
        out = functional.relu(self.out(pooled) + residual)
        return out.transpose(1, 2).reshape(-1, self.out.out_features, height, breadth)


class FixAttentionPool(Rewrite[DenseAttentionPool]):
    """DenseAttentionPool -> FixedAttentionPool for maps of one size; the scale of q is folded into its weight."""

    def __init__(self, map_hw: tuple[int, int]) -> None:
        self.map_hw = map_hw

    def refusal(self, module: DenseAttentionPool) -> str | None:
        return convolution_refusal(module.connect[0], 1) or norm_refusal(module.connect[1])

    def replacement(self, module: DenseAttentionPool) -> nn.Module:
        scale = (module.q_proj.in_features // module.heads) ** -0.5
        q, k, v = (
            (p.weight.double() * factor, p.bias.double() * factor)
            for p, factor in ((module.q_proj, scale), (module.k_proj, 1.0), (module.v_proj, 1.0))
        )
        residual_weight, residual_bias = fold(module.connect[0], module.connect[1])  # type: ignore[arg-type]
        weight = torch.cat([q[0], k[0], v[0]]).T  # (2048, 3 * 2048)
        embedding = module.double_embedding(self.map_hw)  # (hw, 2048)
        place = embedding @ weight + torch.cat([q[1], k[1], v[1]])
        dtype = module.q_proj.weight.dtype
        return FixedAttentionPool(
            torch.cat([weight, residual_weight.flatten(1).T], dim=1).to(dtype),
            torch.cat([place, residual_bias.expand(len(place), -1)], dim=1).unsqueeze(0).to(dtype),
            module.c_proj,
            module.heads,
        )
