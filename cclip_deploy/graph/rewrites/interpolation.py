"""A 3x3 convolution after a bilinear upsampling, its channels mixed before it.

conv(up(x)) = sum over taps of shift_tap(up(W_tap x)), because upsampling works on each channel alone: the 1x1 products
run at low resolution, 16 times fewer pixels. Upsampling and shift are then one constant matrix along each axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite

TAPS = 3


def bilinear_matrix(size: int, scale: int) -> Tensor:
    """(scale * size, size) float64: PyTorch's bilinear upsampling of one axis, align_corners false."""
    place = ((torch.arange(scale * size, dtype=torch.float64) + 0.5) / scale - 0.5).clamp(min=0)
    low = place.floor().long().clamp(max=size - 1)
    share = place - low
    matrix = torch.zeros(scale * size, size, dtype=torch.float64)
    rows = torch.arange(scale * size)
    matrix[rows, low] += 1 - share
    matrix[rows, (low + 1).clamp(max=size - 1)] += share
    return matrix


def shifted_matrices(size: int, scale: int) -> Tensor:
    """(3, scale * size, size): row r of tap k is row r + k - 1 of the upsampled axis, zero outside it."""
    padded = torch.nn.functional.pad(bilinear_matrix(size, scale), (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + scale * size] for tap in range(TAPS)])


class MixThenRise(nn.Module):
    """1x1 products to nine taps at low resolution, one constant matrix along y, one along x, ReLU."""

    rise_y: Tensor
    rise_x: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, map_hw: tuple[int, int], scale: int) -> None:
        super().__init__()
        dtype = weight.dtype
        self.out_width = weight.shape[0]
        self.map_hw, self.scale = map_hw, scale
        taps = weight.permute(0, 3, 2, 1)  # (C_out, k_x, k_y, C_in)
        self.mix = nn.Parameter(taps.reshape(-1, weight.shape[1], 1, 1).contiguous(), requires_grad=False)
        # The middle tap is never shifted outside, so its rows sum to one: a bias given to it arrives everywhere.
        per_tap = torch.zeros(self.out_width, TAPS * TAPS, dtype=dtype)
        per_tap[:, TAPS * TAPS // 2] = bias
        self.bias = nn.Parameter(per_tap.flatten(), requires_grad=False)
        height, breadth = map_hw
        along_y = shifted_matrices(height, scale).permute(1, 0, 2).reshape(scale * height, TAPS * height)
        along_x = shifted_matrices(breadth, scale).permute(0, 2, 1).reshape(TAPS * breadth, scale * breadth)
        self.register_buffer("rise_y", along_y.to(dtype))
        self.register_buffer("rise_x", along_x.to(dtype))

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, h, w) -> (B, C_out, 4h, 4w)
        height, breadth = self.map_hw
        tall = self.scale * height
        mixed = torch.nn.functional.conv2d(x, self.mix, self.bias)  # (B, C_out * 3 * 3, h, w)
        mixed = mixed.reshape(-1, self.out_width * TAPS, TAPS * height, breadth)
        risen = self.rise_y @ mixed  # (B, C_out * k_x, 4h, w)
        risen = risen.reshape(-1, self.out_width, TAPS, tall, breadth).transpose(2, 3)
        risen = risen.reshape(-1, self.out_width, tall, TAPS * breadth) @ self.rise_x
        return torch.relu(risen)


class MixBeforeInterpolation(Rewrite[nn.Sequential]):
    """The block (3x3 convolution, batch norm, ReLU) that follows a bilinear upsampling -> MixThenRise with both."""

    def __init__(self, map_hw: tuple[int, int], scale: int = 4) -> None:
        self.map_hw, self.scale = map_hw, scale

    def refusal(self, module: nn.Sequential) -> str | None:
        if len(module) != 3 or not isinstance(module[2], nn.ReLU):
            return "it is no convolution, batch norm and ReLU"
        return convolution_refusal(module[0], TAPS) or norm_refusal(module[1])

    def replacement(self, module: nn.Sequential) -> nn.Module:
        convolution, norm = module[0], module[1]
        dtype = convolution.weight.dtype
        weight, bias = fold(convolution, norm)  # type: ignore[arg-type]
        return MixThenRise(weight.to(dtype), bias.to(dtype), self.map_hw, self.scale)  # type: ignore[arg-type]
