"""Training forward pass: one image pass for all prompts of an image, and cheaper mask heads.

Outputs, gradients and batch-norm statistics equal those of the published form. The rewrites are those of
`graph.rewrites.interpolation` and `graph.rewrites.prompt_kernel`, but weights are not folded and batch norms stay in
training mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cclip_deploy.model.head import MaskHead
    from cclip_deploy.model.network import CausalCLIPSeg

SCALE = 4
SHIFTS = 3


def multi_prompt_logits(model: CausalCLIPSeg, images: Tensor, tokens: Tensor) -> Tensor:
    """Return causal logits of P prompts per image: (B, 3, H, W), (B, P, L) -> (B, P, H, W).

    Equals `model.causal_logits` row by row, except that in training mode a batch norm counts each image once, not
    P times.
    """
    features = model.neck.causal_features(model.image_tower(images))
    return head_logits(model.head, features, prompt_states(model, tokens))


def prompt_states(model: CausalCLIPSeg, tokens: Tensor) -> Tensor:
    """Run the text tower on P prompts per image: (B, P, L) -> (B, P, 512)."""
    batch, prompts, _ = tokens.shape
    states: Tensor = model.text_tower(tokens.flatten(0, 1)).reshape(batch, prompts, -1)
    return states


def head_logits(head: MaskHead, features: Tensor, states: Tensor) -> Tensor:
    """Run a mask head with P prompts per image: (B, 512, H/16, W/16), (B, P, 512) -> (B, P, H, W).

    The last 1x1 convolution is multiplied into the prompt kernels. Their 3x3 convolution is one matrix product and nine
    shifted additions; zero padding applies after the 1x1 bias, so the bias counts only inside the image.
    """
    from torch.nn import functional

    batch, prompts = states.shape[:2]
    upsampled = _interpolated_block(head.block2, _interpolated_block(head.block1, features))  # (B, 256, H, W)
    kernel = head.kernel(states.flatten(0, 1))  # (B * P, 256, 3, 3), (B * P,)
    taps = (
        kernel.weight.flip(2, 3).flatten(2).transpose(1, 2).reshape(batch, prompts * SHIFTS**2, -1)
    )  # (B, P * 9, 256)
    mix_weight, mix_bias = head.mix.parameters()  # (256, 256, 1, 1), (256,)
    terms = (taps @ mix_weight.flatten(1)) @ upsampled.flatten(2) + (taps @ mix_bias).unsqueeze(2)
    logits = functional.fold(terms, upsampled.shape[-2:], kernel_size=SHIFTS, padding=1)  # (B, P, H, W)
    return logits + kernel.bias.reshape(batch, prompts, 1, 1)


def _interpolated_block(block: nn.Module, x: Tensor) -> Tensor:
    """Bilinear upsampling by 4, then 3x3 convolution, batch norm, ReLU: (B, C, h, w) -> (B, C_out, 4h, 4w)."""
    convolution, norm, activation = block.children()
    (weight,) = convolution.parameters()
    upsampled: Tensor = activation(norm(_convolve_interpolated(x, weight)))
    return upsampled


def _convolve_interpolated(x: Tensor, weight: Tensor) -> Tensor:
    """Upsample x (B, C, h, w) by 4 and convolve with `weight` (C_out, C, 3, 3), zero padded."""
    from cclip_deploy.graph.rewrites.interpolation import shifted_matrices

    batch, channels, height, width = x.shape
    along_y, along_x = (shifted_matrices(size, SCALE).to(x) for size in (height, width))  # (3, 4h, h), (3, 4w, w)
    taps = weight.permute(0, 3, 2, 1).reshape(-1, channels)  # rows: C_out, k_x, k_y
    mixed = (taps @ x.flatten(2)).reshape(batch, -1, SHIFTS * height, width)  # (B, C_out * k_x, k_y * h, w)
    rows = along_y.transpose(0, 1).reshape(SCALE * height, SHIFTS * height) @ mixed  # (B, C_out * k_x, 4h, w)
    rows = rows.reshape(batch, -1, SHIFTS, SCALE * height, width).transpose(2, 3).flatten(3)  # (B, C_out, 4h, k_x * w)
    return rows @ along_x.transpose(1, 2).reshape(SHIFTS * width, SCALE * width)  # (B, C_out, 4h, 4w)
