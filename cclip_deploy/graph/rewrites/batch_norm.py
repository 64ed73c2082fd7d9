"""Fold a batch norm into the preceding convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cclip_deploy.graph.rewrites.rewrite import Rewrite


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 (C,), so that a batch norm in eval mode is x * scale + shift."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics is not an affine map")
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the convolution that equals `convolution` followed by `norm`."""
    scale, shift = scale_and_shift(norm)
    bias = 0 if convolution.bias is None else convolution.bias.double() * scale
    return convolution.weight.double() * scale[:, None, None, None], shift + bias


def norm_refusal(norm: nn.Module) -> str | None:
    """Return why a module is not a batch norm with fixed statistics, or None if it is one."""
    if not isinstance(norm, nn.BatchNorm2d):
        return "its convolution is not followed by a batch norm"
    if norm.training:
        return "the batch norm is in training mode, so its statistics depend on the batch; call eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm has no running statistics"
    if norm.weight is None:
        return "the batch norm has no weight and bias"
    return None


def convolution_refusal(convolution: nn.Module, size: int) -> str | None:
    """Return why a module is not a dense, unstrided, zero-padded convolution of this kernel size, or None if it is."""
    if not isinstance(convolution, nn.Conv2d) or convolution.kernel_size != (size, size):
        return f"it has no {size}x{size} convolution where one is expected"
    if (convolution.stride, convolution.dilation, convolution.groups) != ((1, 1), (1, 1), 1):
        return f"its {size}x{size} convolution has a stride, a dilation or groups"
    if convolution.padding != (size // 2, size // 2) or convolution.padding_mode != "zeros":
        return f"its {size}x{size} convolution does not pad {size // 2} zeros on each side"
    return None


class FoldBatchNorm(Rewrite[nn.Sequential]):
    """Sequential(convolution, batch norm, ...) -> Sequential(convolution with bias, ...)."""

    def refusal(self, module: nn.Sequential) -> str | None:
        if len(module) < 2 or not isinstance(module[0], nn.Conv2d) or not isinstance(module[1], nn.BatchNorm2d):
            return "it does not begin with a convolution and a batch norm"
        if module[0].padding_mode != "zeros":
            return f"its convolution pads with {module[0].padding_mode}"
        return norm_refusal(module[1])

    def replacement(self, module: nn.Sequential) -> nn.Module:
        convolution, norm, *rest = module
        return nn.Sequential(folded_convolution(convolution, norm), *rest)  # type: ignore[arg-type]


def folded_convolution(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return the convolution with bias that equals `convolution` followed by `norm`."""
    weight, bias = fold(convolution, norm)
    folded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        stride=convolution.stride,  # type: ignore[arg-type]
        padding=convolution.padding,  # type: ignore[arg-type]
        dilation=convolution.dilation,  # type: ignore[arg-type]
        groups=convolution.groups,
        device="meta",
    )
    dtype = convolution.weight.dtype
    folded.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return folded
