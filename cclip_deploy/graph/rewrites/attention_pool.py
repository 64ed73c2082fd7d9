"""Dense attention pool as one 1x1 convolution, with a constant positional embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.towers import DenseAttentionPool


class FixedAttentionPool(nn.Module):
    """Dense attention pool for maps of one size.

    Queries, keys, values and the residual are one 1x1 convolution of x plus a constant map: W(x + E) = Wx + WE.
    Channels come first throughout, so no tensor of the map's size is transposed.
    """

    place: Tensor

    def __init__(self, weight: Tensor, place: Tensor, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (3 * 2048 + 512, 2048, 1, 1)
        self.register_buffer("place", place)  # (1, 3 * 2048 + 512, h, w)
        self.out_weight = nn.Parameter(out.weight.detach()[:, :, None, None], requires_grad=False)
        self.out_bias = nn.Parameter(out.bias.detach(), requires_grad=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:  # (B, 2048, h, w) -> (B, 512, h, w)
        _, channels, height, width = x.shape
        product = functional.conv2d(x, self.weight) + self.place
        query, key, value, residual = torch.split(product, [channels, channels, channels, len(self.out_weight)], dim=1)
        per_head = (-1, self.heads, channels // self.heads, height * width)
        scores = query.reshape(per_head).transpose(2, 3) @ key.reshape(per_head)  # (B, heads, hw, hw)
        pooled = value.reshape(per_head) @ scores.softmax(dim=-1).transpose(2, 3)  # (B, heads, 64, hw)
        out = functional.conv2d(pooled.reshape(-1, channels, height, width), self.out_weight, self.out_bias)
        return functional.relu(out + residual)


class FixAttentionPool(Rewrite[DenseAttentionPool]):
    """DenseAttentionPool -> FixedAttentionPool for maps of one size; the queries' scale is folded into their weight."""

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
        weight = torch.cat([q[0], k[0], v[0]])  # (3 * 2048, 2048)
        embedding = module.double_embedding(self.map_hw)  # (hw, 2048)
        place = weight @ embedding.T + torch.cat([q[1], k[1], v[1]]).unsqueeze(1)
        place = torch.cat([place, residual_bias.unsqueeze(1).expand(-1, place.shape[1])])
        dtype = module.q_proj.weight.dtype
        return FixedAttentionPool(
            torch.cat([weight, residual_weight.flatten(1)])[:, :, None, None].to(dtype),
            place.reshape(1, -1, *self.map_hw).to(dtype),
            module.c_proj,
            module.heads,
        )
