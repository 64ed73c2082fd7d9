"""Text-to-pixel mask head: the prompt determines the kernel of the last convolution (CRIS, Wang et al., CVPR 2022)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.model.config import ModelConfig
from cclip_deploy.model.neck import convolution_block

TAPS = 9


class PromptKernel(NamedTuple):
    """Weight and bias of the last convolution, computed from a text embedding."""

    weight: Tensor  # (B, 256, 3, 3)
    bias: Tensor  # (B,)


class MaskHead(nn.Module):
    """Upsample features to the image size and convolve each image with the kernel of its prompt."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, out_width = config.neck_width, config.feature_width
        self.block1 = convolution_block(width, width, 3)
        self.block2 = convolution_block(width, out_width, 3)
        self.mix = nn.Conv2d(out_width, out_width, 1)
        self.prompt = nn.Linear(config.embed_dim, TAPS * out_width + 1)

    def kernel(self, state: Tensor) -> PromptKernel:  # (B, 512) -> (B, 256, 3, 3), (B,)
        values = self.prompt(state)
        return PromptKernel(values[:, :-1].reshape(len(state), -1, 3, 3), values[:, -1])

    def upsample(self, features: Tensor) -> Tensor:
        """(B, 512, H/16, W/16) -> (B, 256, H, W): everything before the last 1x1 convolution."""
        x = functional.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
        x = self.block1(x)  # (B, 512, H/4, W/4)
        x = functional.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        upsampled: Tensor = self.block2(x)
        return upsampled

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        """(B, 512, H/16, W/16), (B, 512) -> logits (B, 1, H, W)."""
        return self.apply_prompt(self.upsample(features), state)

    def apply_prompt(self, upsampled: Tensor, state: Tensor) -> Tensor:
        """Upsampled features (B, 256, H, W) and text embeddings (B, 512), row by row -> logits (B, 1, H, W)."""
        x = self.mix(upsampled)
        batch, channels, height, width = x.shape
        kernel = self.kernel(state)
        logits = functional.conv2d(
            x.reshape(1, batch * channels, height, width), kernel.weight, kernel.bias, padding=1, groups=batch
        )
        return logits.reshape(batch, 1, height, width)


def prompt_kernel_rows(weight: Tensor) -> Tensor:
    """(B, 256, 3, 3) -> (B, 9, 256), tap = 3 * k_y + k_x."""
    return torch.flatten(weight, 2).transpose(1, 2)
