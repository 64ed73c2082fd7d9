"""A 3x3 convolution after a bilinear upsampling, its channels mixed before it.

conv(up(x)) = sum over taps of shift_tap(up(W_tap x)), because upsampling works on each channel alone: the 1x1 products
run at low resolution, 16 times fewer pixels. Upsampling and shift are then one constant matrix along each axis, of
which only the blocks near the diagonal are stored and multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite

TAPS = 3
SHORTEST_BLOCK = 7


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
    padded = functional.pad(bilinear_matrix(size, scale), (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + scale * size] for tap in range(TAPS)])


class Bands:
    """The non-zero blocks of one axis' shifted matrices: each block of outputs reads a short window of the input.

    Attributes:
        places: (blocks, window) int64, the input positions that each block reads.
        weights: (blocks, scale * block, 3, window) float64, by output, tap and window position.
    """

    def __init__(self, size: int, scale: int) -> None:
        count = size // block_size(size)
        block = size // count
        window = block + min(2, count - 1)  # a neighbour on either side, where there is one
        starts = (torch.arange(count) * block - 1).clamp(0, size - window)
        self.places = starts.unsqueeze(1) + torch.arange(window)
        dense = shifted_matrices(size, scale).reshape(TAPS, count, scale * block, size)
        read = self.places.reshape(1, count, 1, window).expand(TAPS, -1, scale * block, -1)
        self.weights = dense.gather(3, read).permute(1, 2, 0, 3)


def block_size(size: int) -> int:
    """The smallest divisor of an axis that is at least 7: shorter blocks read more than they save."""
    return next(divisor for divisor in range(min(size, SHORTEST_BLOCK), size + 1) if size % divisor == 0)


class MixThenRise(nn.Module):
    """1x1 products to nine taps at low resolution, constant banded products along y and along x, ReLU.

    Channels come last, so that every product is one plain batched matrix product and nothing is transposed between.
    """

    bands_y: Tensor
    bands_x: Tensor
    places_y: Tensor
    places_x: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, map_hw: tuple[int, int], scale: int) -> None:
        super().__init__()
        dtype = weight.dtype
        self.out_width, self.map_hw, self.scale = weight.shape[0], map_hw, scale
        taps = weight.permute(2, 1, 3, 0).reshape(TAPS, weight.shape[1], -1)  # (k_y, C_in, k_x C_out)
        self.mix = nn.ParameterList([nn.Parameter(tap.contiguous(), requires_grad=False) for tap in taps])
        # The middle tap is never shifted outside, so its rows sum to one: a bias given to it arrives everywhere.
        self.bias = nn.Parameter(functional.pad(bias, (len(bias), len(bias))), requires_grad=False)
        height, breadth = map_hw
        rows, columns = Bands(height, scale), Bands(breadth, scale)
        self.register_buffer("bands_y", rows.weights.flatten(2).to(dtype))  # (blocks, outputs, k_y window)
        self.register_buffer("bands_x", columns.weights.transpose(2, 3).flatten(2).to(dtype))  # ... window k_x)
        by_tap = rows.places.unsqueeze(1) + height * torch.arange(TAPS).reshape(1, TAPS, 1)
        self.register_buffer("places_y", by_tap.flatten())
        self.register_buffer("places_x", columns.places.flatten())

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C_in) -> (B, 4h, 4w, C_out)
        height, breadth = self.map_hw
        tall, wide = self.scale * height, self.scale * breadth
        pixels = x.reshape(-1, x.shape[3])
        first, middle, last = self.mix
        taps = [pixels @ first, torch.addmm(self.bias, pixels, middle), pixels @ last]
        mixed = torch.cat([tap.reshape(-1, height, breadth * TAPS * self.out_width) for tap in taps], dim=1)
        blocks, _, read = self.bands_y.shape
        windows = mixed.index_select(1, self.places_y).reshape(-1, blocks, read, breadth * TAPS * self.out_width)
        risen = (self.bands_y @ windows).reshape(-1, breadth, TAPS * self.out_width)  # (B 4h, w, k_x C_out)
        blocks, _, read = self.bands_x.shape
        windows = risen.index_select(1, self.places_x).reshape(-1, blocks, read, self.out_width)
        return torch.relu((self.bands_x @ windows).reshape(-1, tall, wide, self.out_width))


class MixBeforeInterpolation(Rewrite[nn.Sequential]):
    """The block (3x3 convolution, batch norm, ReLU) that follows a bilinear upsampling -> MixThenRise with both.

    The block takes the low-resolution map; channels come last in it, and in what it gives.
    """

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
