"""The training form: one pass over an image for all its prompts, and mask heads of less arithmetic.

The numbers, gradients and batch-norm statistics are the published form's, by the exact rewrites that
`graph.rewrites.interpolation` and `graph.rewrites.prompt_kernel` explain; but here every weight stays the module's own,
and batch norms stay in training mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cclip_deploy.model.head import MaskHead
    from cclip_deploy.model.network import CausalCLIPSeg

SCALE = 4
SHIFTS = 3


def grouped_logits(model: CausalCLIPSeg, images: Tensor, tokens: Tensor) -> Tensor:
    """Causal logits of P prompts for each image: (B, 3, H, W), (B, P, L) -> (B, P, H, W).

    Row by row they are `model.causal_logits`; in training mode a batch norm counts each image once, not P times.
    """
    features = model.neck.causal_features(model.image_tower(images))
    return head_logits(model.head, features, prompt_states(model, tokens))


def prompt_states(model: CausalCLIPSeg, tokens: Tensor) -> Tensor:
    """The text tower on P prompts for each image: (B, P, L) -> (B, P, 512)."""
    batch, prompts, _ = tokens.shape
    states: Tensor = model.text_tower(tokens.flatten(0, 1)).reshape(batch, prompts, -1)
    return states


def head_logits(head: MaskHead, features: Tensor, states: Tensor) -> Tensor:
    """A mask head asked P times for each image: (B, 512, H/16, W/16), (B, P, 512) -> (B, P, H, W).

    The last 1x1 convolution is multiplied into the prompts' kernels, and their convolution is one product and nine
    shifted adds. Each term belongs to a pixel of the image, so the 1x1 convolution's bias counts only inside it.
    """
    from torch.nn import functional

    batch, prompts = states.shape[:2]
    risen = _interpolated_block(head.block2, _interpolated_block(head.block1, features))  # (B, 256, H, W)
    kernel = head.kernel(states.flatten(0, 1))  # (B * P, 256, 3, 3), (B * P,)
    taps = (
        kernel.weight.flip(2, 3).flatten(2).transpose(1, 2).reshape(batch, prompts * SHIFTS**2, -1)
    )  # (B, P * 9, 256)
    mix_weight, mix_bias = head.mix.parameters()  # (256, 256, 1, 1), (256,)
    terms = (taps @ mix_weight.flatten(1)) @ risen.flatten(2) + (taps @ mix_bias).unsqueeze(2)
    logits = functional.fold(terms, risen.shape[-2:], kernel_size=SHIFTS, padding=1)  # (B, P, H, W)
    return logits + kernel.bias.reshape(batch, prompts, 1, 1)


def _interpolated_block(block: nn.Module, x: Tensor) -> Tensor:
    """Bilinear upsampling by 4, then 3x3 convolution, batch norm, ReLU: (B, C, h, w) -> (B, C_out, 4h, 4w)."""
    convolution, norm, activation = block.children()
    (weight,) = convolution.parameters()
    risen: Tensor = activation(norm(_convolve_interpolated(x, weight)))
    return risen


def _convolve_interpolated(x: Tensor, weight: Tensor) -> Tensor:
    """The 3x3 convolution `weight` (C_out, C, 3, 3), zero padded, of x (B, C, h, w) upsampled by 4."""
    from cclip_deploy.graph.rewrites.interpolation import shifted_matrices

    batch, width, height, breadth = x.shape
    along_y, along_x = (shifted_matrices(size, SCALE).to(x) for size in (height, breadth))  # (3, 4h, h), (3, 4w, w)
    taps = weight.permute(0, 3, 2, 1).reshape(-1, width)  # rows: C_out, k_x, k_y
    mixed = (taps @ x.flatten(2)).reshape(batch, -1, SHIFTS * height, breadth)  # (B, C_out * k_x, k_y * h, w)
    tall = along_y.transpose(0, 1).reshape(SCALE * height, SHIFTS * height) @ mixed  # (B, C_out * k_x, 4h, w)
    tall = (
        tall.reshape(batch, -1, SHIFTS, SCALE * height, breadth).transpose(2, 3).flatten(3)
    )  # (B, C_out, 4h, k_x * w)
    return tall @ along_x.transpose(1, 2).reshape(SHIFTS * breadth, SCALE * breadth)  # (B, C_out, 4h, 4w)
