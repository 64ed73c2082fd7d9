"""The neck's operations, one tap or one pixel after the other: slow, plain, and unlike the package's way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.model.neck import Carafe


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """A zero-padded cross-correlation, one tap after the other."""
    height, width, half = x.shape[2], x.shape[3], weight.shape[2] // 2
    padded = functional.pad(x, (half,) * 4)
    return sum(
        (
            torch.einsum("oi,bihw->bohw", weight[:, :, y, x], padded[:, :, y : y + height, x : x + width])
            for y in range(weight.shape[2])
            for x in range(weight.shape[3])
        ),
        start=torch.zeros((), dtype=torch.float64),
    )


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var, weight, bias = (v[:, None, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))  # type: ignore[index]
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def block(x: Tensor, module: nn.Module) -> Tensor:
    """Convolution without bias, norm, ReLU."""
    convolution, norm, _ = module.children()
    assert convolution.bias is None
    return normed(convolve(x, convolution.weight), norm).clamp(min=0)


def with_coordinates(x: Tensor) -> Tensor:
    """The input, then x, then y, each from -1 to 1 with both ends."""
    batch, _, height, width = x.shape
    place = torch.zeros(batch, 2, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            place[:, 0, row, column] = -1 + 2 * column / (width - 1) if width > 1 else -1
            place[:, 1, row, column] = -1 + 2 * row / (height - 1) if height > 1 else -1
    return torch.cat([x, place], dim=1)


def carafe_by_pixels(module: Carafe, x: Tensor) -> Tensor:
    """Every output pixel: softmax of its nine scores, times the nine input pixels around half its place."""
    batch, channels, height, width = x.shape
    compressed = convolve(x, module.compress.weight) + module.compress.bias[:, None, None]  # type: ignore[index]
    scores = convolve(compressed, module.encode.weight) + module.encode.bias[:, None, None]  # type: ignore[index]
    risen = torch.zeros(batch, channels, 2 * height, 2 * width, dtype=torch.float64)
    for row in range(2 * height):
        for column in range(2 * width):
            y, x_place, corner = row // 2, column // 2, 2 * (row % 2) + column % 2
            weights = torch.stack([scores[:, 4 * tap + corner, y, x_place] for tap in range(9)]).softmax(0)
            for tap in range(9):
                source_y, source_x = y + tap // 3 - 1, x_place + tap % 3 - 1
                if 0 <= source_y < height and 0 <= source_x < width:
                    risen[:, :, row, column] += weights[tap][:, None] * x[:, :, source_y, source_x]
    return convolve(risen, module.out.weight) + module.out.bias[:, None, None]  # type: ignore[index]
