"""Deploy form of the network: the inference path after exact rewrites, split into image encoder and prompt encoder."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.errors import RewriteRefused, UsageError
from cclip_deploy.graph.rewrites.attention_pool import FixAttentionPool
from cclip_deploy.graph.rewrites.batch_norm import FoldBatchNorm
from cclip_deploy.graph.rewrites.carafe import CarafeAsProduct
from cclip_deploy.graph.rewrites.coordinates import FixCoordinates
from cclip_deploy.graph.rewrites.interpolation import MixBeforeInterpolation
from cclip_deploy.graph.rewrites.prompt_kernel import FoldedKernel, FoldLastConvolution
from cclip_deploy.graph.rewrites.text_tower import FixPromptLength
from cclip_deploy.model.config import CONTEXT_LENGTH, check_image_hw
from cclip_deploy.model.head import TAPS
from cclip_deploy.model.neck import CausalNeck, Masker
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.model.towers import ImagePyramid, ImageTower

Rewritten = TypeVar("Rewritten", bound=nn.Module)


class PromptEncoder(nn.Module):
    """Tokens (P, L) -> kernel (P, 9, 256), tap_bias (P, 9), bias (P,)."""

    def __init__(self, tower: nn.Module, kernel: nn.Module) -> None:
        super().__init__()
        self.tower, self.kernel = tower, kernel

    def forward(self, tokens: Tensor) -> FoldedKernel:
        folded: FoldedKernel = self.kernel(self.tower(tokens))
        return folded


class ImageEncoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, H, W, 256); optionally also the causal masks and the confounding features."""

    def __init__(
        self, tower: ImageTower, neck: CausalNeck, upsample: nn.Module, masks: bool, confounding: bool
    ) -> None:
        super().__init__()
        self.tower, self.neck = tower, neck
        self.rise = upsample  # part of the weights' names in the graph, by which --keep selects blocks
        self.with_masks, self.with_confounding = masks, confounding

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.tower.layer1(self.tower.stem(image))
        v3 = self.tower.layer2(x)
        v4 = self.tower.layer3(v3)
        v5 = self.tower.attnpool(self.tower.layer4(v4))
        levels = self.neck.levels(ImagePyramid(v3, v4, v5))
        masks = self.neck.masks(levels)
        causal = [q * m for q, m in zip(levels, masks, strict=True)]
        features = self.rise(self.neck.aggregate(torch.cat(causal, dim=1)).permute(0, 2, 3, 1))  # (B, H, W, 256)
        outputs = (features, *(masks if self.with_masks else ()))
        if self.with_confounding:
            rest = [q - c for q, c in zip(levels, causal, strict=True)]
            outputs = (*outputs, self.neck.aggregate(torch.cat(rest, dim=1)))
        return outputs


class MaskDecoder(nn.Module):
    """Features (B, H, W, 256) and kernels of P prompts -> logits (B, P, H, W), as one product and nine shifted sums."""

    def forward(self, features: Tensor, kernel: Tensor, tap_bias: Tensor, bias: Tensor) -> Tensor:
        batch, height, width, channels = features.shape
        taps = features.reshape(-1, height * width, channels) @ kernel.reshape(-1, channels).T  # (B, H W, 9 P)
        taps = taps.transpose(1, 2) + tap_bias.reshape(-1, 1)
        logits = sum_shifted(taps.reshape(-1, TAPS, height, width))  # (B P, H, W)
        return logits.reshape(batch, -1, height, width) + bias.reshape(1, -1, 1, 1)


class RowDecoder(nn.Module):
    """Mask decoder for one prompt per image: features (B, H, W, 256) and B kernels -> logits (B, 1, H, W)."""

    def forward(self, features: Tensor, kernel: Tensor, tap_bias: Tensor, bias: Tensor) -> Tensor:
        _, height, width, channels = features.shape
        taps = features.reshape(-1, height * width, channels) @ kernel.transpose(1, 2)  # (B, H W, 9)
        taps = taps.transpose(1, 2) + tap_bias.unsqueeze(2)
        logits = sum_shifted(taps.reshape(-1, TAPS, height, width))
        return logits.unsqueeze(1) + bias.reshape(-1, 1, 1, 1)


class DeployForm(nn.Module):
    """Modules to trace, for one image size and one prompt length."""

    def __init__(self, image_encoder: ImageEncoder, prompt_encoder: PromptEncoder) -> None:
        super().__init__()
        self.image_encoder, self.prompt_encoder = image_encoder, prompt_encoder
        self.mask_decoder, self.row_decoder = MaskDecoder(), RowDecoder()

    def fused(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Image (B, 3, H, W) and tokens (B, L), one prompt per image -> logits (B, 1, H, W)."""
        logits: Tensor = self.row_decoder(self.image_encoder(image)[0], *self.prompt_encoder(tokens))
        return logits

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Image (B, 3, H, W) and tokens (P, L), every prompt on every image -> logits (B, P, H, W)."""
        logits: Tensor = self.mask_decoder(self.image_encoder(image)[0], *self.prompt_encoder(tokens))
        return logits


def sum_shifted(taps: Tensor) -> Tensor:
    """Sum the taps of a 3x3 convolution, (N, 9, H, W) -> (N, H, W); tap 3 k_y + k_x reads at (k_y - 1, k_x - 1)."""
    _, _, height, width = taps.shape
    padded = functional.pad(taps, (1, 1, 1, 1))
    total = padded[:, 0, :height, :width]
    for tap in range(1, TAPS):
        y, x = divmod(tap, 3)
        total = total + padded[:, tap, y : y + height, x : x + width]
    return total


def to_deploy_form(
    model: CausalCLIPSeg,
    image_hw: tuple[int, int],
    prompt_length: int = 32,
    with_masks: bool = False,
    with_confounding: bool = False,
) -> DeployForm:
    """Return the causal inference path of a network after all exact rewrites; the network itself is not changed.

    Raises:
        UsageError: the image size is not a multiple of 32, or the prompt length is out of range.
        RewriteRefused: the model is in training mode, or a module has a structure that a rewrite does not support.
    """
    check_image_hw(image_hw)
    if not 3 <= prompt_length <= CONTEXT_LENGTH:
        raise UsageError(f"A prompt length of {prompt_length} is out of range. Use 3 to {CONTEXT_LENGTH}; 32 is usual.")
    if any(module.training for module in model.modules()):
        raise RewriteRefused(
            "The model is in training mode, so its batch norms depend on the batch. Call eval() first."
        )
    height, width = image_hw
    kernel = FoldLastConvolution()(model.head)
    prompt_encoder = PromptEncoder(FixPromptLength(prompt_length)(model.text_tower), kernel)
    upsample = nn.Sequential(
        MixBeforeInterpolation((height // 16, width // 16))(model.head.block1),
        MixBeforeInterpolation((height // 4, width // 4))(model.head.block2),
    )
    tower, neck = copy_for_rewriting(model.image_tower), copy_for_rewriting(model.neck)
    _rewrite_tower(tower, (height // 32, width // 32))
    _rewrite_neck(neck, (height // 16, width // 16))
    return DeployForm(ImageEncoder(tower, neck, upsample, with_masks, with_confounding), prompt_encoder).eval()


def copy_for_rewriting(module: Rewritten) -> Rewritten:
    """Copy a module so that submodules can be replaced; the copy shares the original's tensors."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _rewrite_tower(tower: ImageTower, map_hw: tuple[int, int]) -> None:
    tower.attnpool = FixAttentionPool(map_hw)(tower.attnpool)  # type: ignore[assignment]
    for module in tower.modules():
        for number in (1, 2, 3):
            convolution, norm = getattr(module, f"conv{number}", None), getattr(module, f"bn{number}", None)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, f"conv{number}", _fold(convolution, norm))
                setattr(module, f"bn{number}", nn.Identity())
        downsample = getattr(module, "downsample", None)
        if isinstance(downsample, nn.Sequential):
            _, convolution, norm = downsample
            downsample[1], downsample[2] = _fold(convolution, norm), nn.Identity()


def _rewrite_neck(neck: CausalNeck, map_hw: tuple[int, int]) -> None:
    neck.carafe = CarafeAsProduct()(neck.carafe)  # type: ignore[assignment]
    for name in ("project4", "refine4", "aggregate"):
        setattr(neck, name, FoldBatchNorm()(getattr(neck, name)))
    for masker in (neck.masker3, neck.masker4, neck.masker5):
        _rewrite_masker(masker, map_hw)


def _rewrite_masker(masker: Masker, map_hw: tuple[int, int]) -> None:
    masker.locate = FixCoordinates(map_hw)(masker.locate)  # type: ignore[assignment]
    masker.relocate = FixCoordinates(map_hw)(masker.relocate)  # type: ignore[assignment]
    masker.mix = FoldBatchNorm()(masker.mix)  # type: ignore[assignment]
    masker.score = _fold(masker.score, masker.norm)  # type: ignore[assignment]
    masker.norm = nn.Identity()  # type: ignore[assignment]


def _fold(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    folded: nn.Module = FoldBatchNorm()(nn.Sequential(convolution, norm))[0]  # type: ignore[index]
    return folded
