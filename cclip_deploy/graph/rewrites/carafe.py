"""CARAFE as one small batched product: no unfold of the upsampled map, channels mixed before the upsampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.neck import Carafe


class CarafeProduct(nn.Module):
    """At each input pixel: (4 outputs x 9 weights) times (9 neighbors x C); then the four outputs take their places.

    The final 1x1 convolution is linear per pixel and the nine weights are the same for all channels, so it moves to the
    input's resolution, a quarter of the work; its bias stays after the sum, as border pixels have fewer neighbors.
    """

    def __init__(self, compress: nn.Conv2d, encode: nn.Conv2d, out_weight: Tensor, out_bias: Tensor) -> None:
        super().__init__()
        self.compress, self.encode = compress, encode
        self.out_weight = nn.Parameter(out_weight, requires_grad=False)
        self.out_bias = nn.Parameter(out_bias, requires_grad=False)
        self.scale, self.taps = Carafe.scale, Carafe.taps

    def forward(self, x: Tensor) -> Tensor:  # (B, 512, h, w) -> (B, 512, 2h, 2w)
        _, width, height, breadth = x.shape
        positions = height * breadth
        scores: Tensor = self.encode(self.compress(x)).reshape(-1, self.taps, self.scale**2, positions)
        weights = scores.permute(0, 3, 2, 1).softmax(dim=3)  # (B, hw, 4, 9)
        mixed = functional.conv2d(x, self.out_weight).permute(0, 2, 3, 1)  # (B, h, w, 512)
        padded = functional.pad(mixed, (0, 0, 1, 1, 1, 1))
        neighbors = torch.stack(
            [padded[:, y : y + height, x : x + breadth] for y in range(3) for x in range(3)], dim=3
        ).reshape(-1, positions, self.taps, width)
        risen = weights @ neighbors  # (B, hw, 4, 512)
        risen = risen.reshape(-1, height, breadth, self.scale, self.scale, width).permute(0, 5, 1, 3, 2, 4)
        risen = risen.reshape(-1, width, self.scale * height, self.scale * breadth)
        return risen + self.out_bias.reshape(1, -1, 1, 1)


class CarafeAsProduct(Rewrite[Carafe]):
    """Carafe -> CarafeProduct."""

    def refusal(self, module: Carafe) -> str | None:
        return convolution_refusal(module.out, 1)

    def replacement(self, module: Carafe) -> nn.Module:
        bias = module.out.bias if module.out.bias is not None else torch.zeros(module.out.out_channels)
        return CarafeProduct(module.compress, module.encode, module.out.weight, bias)
