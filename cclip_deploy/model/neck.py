"""Causal neck: fuses three levels of image features and separates causal from confounding ones with soft masks.

Chen et al., MICCAI 2024, section 2 (causal intervention). CARAFE: Wang et al., ICCV 2019. Coordinate channels: Liu et
al., NeurIPS 2018. The neck does not use the text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.model.config import ModelConfig
from cclip_deploy.model.towers import ImagePyramid


class NeckFeatures(NamedTuple):
    """Outputs of the neck; every tensor is (B, 512, H/16, W/16)."""

    causal: Tensor
    confounding: Tensor
    masks: tuple[Tensor, Tensor, Tensor]
    carafe: Tensor


def convolution_block(in_width: int, out_width: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU; padded to keep the size."""
    return nn.Sequential(
        nn.Conv2d(in_width, out_width, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_width),
        nn.ReLU(inplace=True),
    )


def coordinate_channels(hw: tuple[int, int], like: Tensor) -> Tensor:
    """Return x and y coordinates from -1 to 1, inclusive: (1, 2, h, w)."""
    rows, columns = (torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype) for side in hw)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y]).unsqueeze(0)


class CoordinateBlock(nn.Module):
    """3x3 convolution block with x and y coordinates as additional input channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = convolution_block(width + 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 512, h, w) -> (B, 512, h, w)
        coordinates = coordinate_channels((x.shape[2], x.shape[3]), x).expand(len(x), -1, -1, -1)
        features: Tensor = self.block(torch.cat([x, coordinates], dim=1))
        return features


class Masker(nn.Module):
    """Predict the causal mask of a feature map: a weight in (0, 1) for each channel of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.locate = CoordinateBlock(width)
        self.mix = convolution_block(width, width, 3)
        self.relocate = CoordinateBlock(width)
        self.score = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, 512, h, w) -> (B, 512, h, w)
        return torch.sigmoid(self.norm(self.score(self.relocate(self.mix(self.locate(x))))))


class Carafe(nn.Module):
    """Content-aware 2x upsampling: each output pixel is a weighted sum of nine input pixels, with predicted weights."""

    scale = 2
    taps = 9

    def __init__(self, width: int, compressed_width: int) -> None:
        super().__init__()
        self.compress = nn.Conv2d(width, compressed_width, 1)
        self.encode = nn.Conv2d(compressed_width, self.taps * self.scale**2, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def weights(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> nine weights for each output pixel, (B, 9, 2h, 2w), which sum to one."""
        return functional.pixel_shuffle(self.encode(self.compress(x)), self.scale).softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 512, h, w) -> (B, 512, 2h, 2w)
        batch, channels, height, width = x.shape
        patches = functional.unfold(x, kernel_size=3, padding=1)  # (B, 512 * 9, h * w)
        patches = patches.reshape(batch, channels * self.taps, height, width)
        patches = functional.interpolate(patches, scale_factor=self.scale, mode="nearest")
        patches = patches.reshape(batch, channels, self.taps, self.scale * height, self.scale * width)
        assembled = (patches * self.weights(x).unsqueeze(1)).sum(dim=2)
        projected: Tensor = self.out(assembled)
        return projected


class CausalNeck(nn.Module):
    """Resize three feature levels to 1/16, mask each, and fuse them with a shared 1x1 block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.neck_width
        self.project4 = convolution_block(2 * width, width, 3)
        self.refine4 = convolution_block(width, width, 3)
        self.carafe = Carafe(width, config.carafe_width)
        self.masker3 = Masker(width)
        self.masker4 = Masker(width)
        self.masker5 = Masker(width)
        self.aggregate = convolution_block(3 * width, width, 1)

    def levels(self, pyramid: ImagePyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Return the resized levels q3, q4, q5, each (B, 512, H/16, W/16)."""
        return (
            functional.avg_pool2d(pyramid.v3, 2),
            self.refine4(self.project4(pyramid.v4)),
            self.carafe(pyramid.v5),
        )

    def masks(self, levels: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the causal masks of the three levels, each (B, 512, H/16, W/16) in (0, 1)."""
        q3, q4, q5 = levels
        return self.masker3(q3), self.masker4(q4), self.masker5(q5)

    def forward(self, pyramid: ImagePyramid) -> NeckFeatures:
        levels = self.levels(pyramid)
        masks = self.masks(levels)
        causal = self.aggregate(torch.cat([q * m for q, m in zip(levels, masks, strict=True)], dim=1))
        confounding = self.aggregate(torch.cat([q * (1 - m) for q, m in zip(levels, masks, strict=True)], dim=1))
        return NeckFeatures(causal, confounding, masks, levels[2])

    def causal_features(self, pyramid: ImagePyramid) -> Tensor:
        """Return only the causal features, for inference: (B, 512, H/16, W/16)."""
        levels = self.levels(pyramid)
        masks = self.masks(levels)
        features: Tensor = self.aggregate(torch.cat([q * m for q, m in zip(levels, masks, strict=True)], dim=1))
        return features
