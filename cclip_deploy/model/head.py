"""The text-to-pixel mask head: a prompt becomes the last convolution's kernel (after CRIS, Wang et al., CVPR 2022)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.model.config import ModelConfig
from cclip_deploy.model.neck import convolution_block

TAPS = 9


class PromptKernel(NamedTuple):
    """The last convolution, computed from a prompt's state."""

    weight: Tensor  # (B, 256, 3, 3)
    bias: Tensor  # (B,)


class MaskHead(nn.Module):
    """Brings features to the picture's size and convolves each picture with its own prompt's kernel."""

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

    def rise(self, features: Tensor) -> Tensor:
        """(B, 512, H/16, W/16) -> (B, 256, H, W): everything before the last 1x1 convolution."""
        x = functional.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
        x = self.block1(x)  # (B, 512, H/4, W/4)
        x = functional.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        risen: Tensor = self.block2(x)
        return risen

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        """(B, 512, H/16, W/16), (B, 512) -> logits (B, 1, H, W)."""
        return self.answer(self.rise(features), state)

    def answer(self, risen: Tensor, state: Tensor) -> Tensor:
        """Risen features (B, 256, H, W) and states (B, 512), row by row -> logits (B, 1, H, W)."""
        x = self.mix(risen)
        batch, width, height, breadth = x.shape
        kernel = self.kernel(state)
        logits = functional.conv2d(
            x.reshape(1, batch * width, height, breadth), kernel.weight, kernel.bias, padding=1, groups=batch
        )
        return logits.reshape(batch, 1, height, breadth)


def prompt_kernel_rows(weight: Tensor) -> Tensor:
    """(B, 256, 3, 3) -> (B, 9, 256), tap = 3 * k_y + k_x."""
    return torch.flatten(weight, 2).transpose(1, 2)
