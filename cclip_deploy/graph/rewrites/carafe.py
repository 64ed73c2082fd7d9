"""CARAFE as one batched product, without unfolding the upsampled map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.neck import Carafe


class CarafeProduct(nn.Module):
    """CARAFE as (4 outputs x 9 weights) times (9 neighbors x C) at each input pixel, followed by a pixel shuffle.

    The final 1x1 convolution is linear at each pixel, and the nine weights are the same for all channels, so it runs
    before the upsampling, at a quarter of the cost. Its bias is added after the sum, because border pixels have fewer
    neighbors.
    """

    def __init__(self, compress: nn.Conv2d, encode: nn.Conv2d, out_weight: Tensor, out_bias: Tensor) -> None:
        super().__init__()
        self.compress, self.encode = compress, encode
        self.out_weight = nn.Parameter(out_weight, requires_grad=False)
        self.out_bias = nn.Parameter(out_bias, requires_grad=False)
        self.scale, self.taps = Carafe.scale, Carafe.taps

    def forward(self, x: Tensor) -> Tensor:  # (B, 512, h, w) -> (B, 512, 2h, 2w)
        _, channels, height, width = x.shape
        positions = height * width
        scores: Tensor = self.encode(self.compress(x)).reshape(-1, self.taps, self.scale**2, positions)
        weights = scores.permute(0, 3, 2, 1).softmax(dim=3)  # (B, hw, 4, 9)
        mixed = functional.conv2d(x, self.out_weight).permute(0, 2, 3, 1)  # (B, h, w, 512)
        padded = functional.pad(mixed, (0, 0, 1, 1, 1, 1))
        neighbors = torch.stack(
            [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)], dim=3
        ).reshape(-1, positions, self.taps, channels)
        upsampled = weights @ neighbors  # (B, hw, 4, 512)
        upsampled = upsampled.reshape(-1, height, width, self.scale, self.scale, channels).permute(0, 5, 1, 3, 2, 4)
        upsampled = upsampled.reshape(-1, channels, self.scale * height, self.scale * width)
        return upsampled + self.out_bias.reshape(1, -1, 1, 1)


class CarafeAsProduct(Rewrite[Carafe]):
    """Carafe -> CarafeProduct."""

    def refusal(self, module: Carafe) -> str | None:
        return convolution_refusal(module.out, 1)

    def replacement(self, module: Carafe) -> nn.Module:
        bias = module.out.bias if module.out.bias is not None else torch.zeros(module.out.out_channels)
        return CarafeProduct(module.compress, module.encode, module.out.weight, bias)
