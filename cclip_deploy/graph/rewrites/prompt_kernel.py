"""Fold the head's last 1x1 convolution into the kernels that prompts produce."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.head import TAPS, MaskHead


class FoldedKernel(NamedTuple):
    """Kernels of P prompts, which include the preceding 1x1 convolution."""

    kernel: Tensor  # (P, 9, 256)
    tap_bias: Tensor  # (P, 9), added only where the tap lies inside the image
    bias: Tensor  # (P,)


class KernelFromState(nn.Module):
    """One linear layer from a prompt's state to its folded kernel, because K W1 and K b1 are linear in the state."""

    def __init__(self, weight: Tensor, bias: Tensor, feature_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.linear.bias = nn.Parameter(bias, requires_grad=False)
        self.feature_width = feature_width

    def forward(self, state: Tensor) -> FoldedKernel:  # (P, 512) -> (P, 9, 256), (P, 9), (P,)
        values = self.linear(state)
        end = TAPS * self.feature_width
        kernel = values[:, :end].reshape(-1, TAPS, self.feature_width)
        return FoldedKernel(kernel, values[:, end : end + TAPS], values[:, end + TAPS])


class FoldLastConvolution(Rewrite[MaskHead]):
    """The prompt layer and the 1x1 layer of a MaskHead -> KernelFromState."""

    def refusal(self, module: MaskHead) -> str | None:
        if module.mix.bias is None:
            return "the layer before the prompt's convolution has no bias"
        return convolution_refusal(module.mix, 1)

    def replacement(self, module: MaskHead) -> nn.Module:
        width = module.mix.out_channels
        rows = torch.cat([module.prompt.weight, module.prompt.bias.unsqueeze(1)], dim=1).double()  # (9 * 256 + 1, 513)
        kernel = rows[:-1].reshape(width, TAPS, -1)  # (256, 9, 513): channel-major, tap = 3 k_y + k_x
        mix, mix_bias = module.mix.weight.flatten(1).double(), module.mix.bias.double()  # type: ignore[union-attr]
        folded = torch.einsum("ots,oi->tis", kernel, mix)  # (9, 256, 513)
        tap_bias = torch.einsum("ots,o->ts", kernel, mix_bias)
        stacked = torch.cat([folded.flatten(0, 1), tap_bias, rows[-1:]]).to(module.prompt.weight.dtype)
        return KernelFromState(stacked[:, :-1].contiguous(), stacked[:, -1].contiguous(), module.mix.in_channels)
