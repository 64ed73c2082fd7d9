"""A 3x3 convolution after bilinear upsampling, with its channels mixed before the upsampling.

conv(up(x)) = sum over taps of shift_tap(up(W_tap x)), because upsampling works on each channel alone: the 1x1 products
run at low resolution, on 16 times fewer pixels. Upsampling and shift are then one constant matrix for each axis, of
which only the blocks near the diagonal are stored and multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite

SHIFTS = 3
SHORTEST_BLOCK = 7


def bilinear_matrix(size: int, scale: int) -> Tensor:
    """Return PyTorch's bilinear upsampling of one axis as a float64 matrix (scale * size, size)."""
    position = ((torch.arange(scale * size, dtype=torch.float64) + 0.5) / scale - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=size - 1)
    fraction = position - low
    matrix = torch.zeros(scale * size, size, dtype=torch.float64)
    rows = torch.arange(scale * size)
    matrix[rows, low] += 1 - fraction
    matrix[rows, (low + 1).clamp(max=size - 1)] += fraction
    return matrix


def shifted_matrices(size: int, scale: int) -> Tensor:
    """Return (3, scale * size, size): row r of tap k is row r + k - 1 of the upsampling matrix, or zero outside it."""
    padded = functional.pad(bilinear_matrix(size, scale), (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + scale * size] for tap in range(SHIFTS)])


class Bands:
    """Non-zero blocks of one axis' shifted matrices: each block of outputs reads a short window of the input.

    Attributes:
        places: (blocks, window) int64, the input positions that each block reads.
        weights: (blocks, scale * block, 3, window) float64, by output, tap and window position.
    """

    def __init__(self, size: int, scale: int) -> None:
        count = size // block_size(size)
        block = size // count
        window = block + min(2, count - 1)  # one neighbor on each side, if the axis has one
        starts = (torch.arange(count) * block - 1).clamp(0, size - window)
        self.places = starts.unsqueeze(1) + torch.arange(window)
        dense = shifted_matrices(size, scale).reshape(SHIFTS, count, scale * block, size)
        read = self.places.reshape(1, count, 1, window).expand(SHIFTS, -1, scale * block, -1)
        self.weights = dense.gather(3, read).permute(1, 2, 0, 3)


def block_size(size: int) -> int:
    """Return the smallest divisor of an axis that is at least 7: windows of shorter blocks overlap too much."""
    return next(divisor for divisor in range(min(size, SHORTEST_BLOCK), size + 1) if size % divisor == 0)


class MixThenUpsample(nn.Module):
    """A 1x1 convolution to nine taps at low resolution, banded products along y and x, and a ReLU.

    Channels come last between them, so that a window is gathered as long rows and no full-size tensor is transposed.
    """

    bands_y: Tensor
    bands_x: Tensor
    places_y: Tensor
    places_x: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, map_hw: tuple[int, int], scale: int) -> None:
        super().__init__()
        dtype = weight.dtype
        self.out_width = weight.shape[0]
        self.width, self.full_hw = map_hw[1], (scale * map_hw[0], scale * map_hw[1])
        taps = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1)  # (k_y k_x C_out, C_in, 1, 1)
        self.mix = nn.Parameter(taps.contiguous(), requires_grad=False)
        # The rows of the middle tap, which is not shifted, sum to one: a bias added to it reaches every pixel.
        middle = SHIFTS * SHIFTS // 2 * self.out_width
        self.bias = nn.Parameter(functional.pad(bias, (middle, middle)), requires_grad=False)
        rows, columns = Bands(map_hw[0], scale), Bands(map_hw[1], scale)
        self.register_buffer("bands_y", rows.weights.transpose(2, 3).flatten(2).unsqueeze(1).to(dtype))
        self.register_buffer("bands_x", columns.weights.transpose(2, 3).flatten(2).to(dtype))
        blocks, _, outputs, _ = self.bands_y.shape  # (blocks, 1, outputs, window k_y)
        every_column = torch.arange(map_hw[1]).reshape(1, -1, 1)
        self.register_buffer("places_y", (rows.places.unsqueeze(1) * map_hw[1] + every_column).flatten())
        block, row = torch.arange(blocks).reshape(-1, 1, 1, 1), torch.arange(outputs).reshape(1, -1, 1, 1)
        self.register_buffer("places_x", ((block * map_hw[1] + columns.places) * outputs + row).flatten())

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C_in) -> (B, 4h, 4w, C_out)
        height, width = self.full_hw
        mixed = functional.conv2d(x.permute(0, 3, 1, 2), self.mix, self.bias)
        rows = mixed.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, k_y k_x C_out)
        blocks, _, _, read = self.bands_y.shape
        windows = rows.index_select(1, self.places_y).reshape(-1, blocks, self.width, read, SHIFTS * self.out_width)
        upsampled = self.bands_y @ windows  # (B, blocks, w, outputs, k_x C_out)
        rows = upsampled.reshape(-1, self.width * height, SHIFTS * self.out_width)
        blocks, _, read = self.bands_x.shape
        windows = rows.index_select(1, self.places_x).reshape(-1, height, blocks, read, self.out_width)
        return torch.relu((self.bands_x @ windows).reshape(-1, height, width, self.out_width))


class MixBeforeInterpolation(Rewrite[nn.Sequential]):
    """Sequential(3x3 convolution, batch norm, ReLU) after a bilinear upsampling -> MixThenUpsample for both.

    The replacement takes the low-resolution map. Input and output have channels last.
    """

    def __init__(self, map_hw: tuple[int, int], scale: int = 4) -> None:
        self.map_hw, self.scale = map_hw, scale

    def refusal(self, module: nn.Sequential) -> str | None:
        if len(module) != 3 or not isinstance(module[2], nn.ReLU):
            return "it is not a convolution, batch norm and ReLU"
        return convolution_refusal(module[0], SHIFTS) or norm_refusal(module[1])

    def replacement(self, module: nn.Sequential) -> nn.Module:
        convolution, norm = module[0], module[1]
        dtype = convolution.weight.dtype
        weight, bias = fold(convolution, norm)  # type: ignore[arg-type]
        return MixThenUpsample(weight.to(dtype), bias.to(dtype), self.map_hw, self.scale)  # type: ignore[arg-type]
