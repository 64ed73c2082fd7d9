"""CausalCLIPSeg (Chen et al., MICCAI 2024) with the published order of operations, for training and as reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cclip_deploy.model.config import ModelConfig
from cclip_deploy.model.head import MaskHead
from cclip_deploy.model.neck import CausalNeck
from cclip_deploy.model.towers import ImageTower, TextTower


class Logits(NamedTuple):
    """Logits of both branches, each (B, 1, H, W); the predicted mask is sigmoid(causal) >= 0.5."""

    causal: Tensor
    confounding: Tensor


class CausalCLIPSeg(nn.Module):
    """Segmentation network that predicts the region of an image that a prompt describes.

    Inputs: image (B, 3, H, W) float, normalized with CLIP's mean and deviation, H and W multiples of 32; tokens (B, L)
    int, L <= 77, CLIP ids with zeros after the end token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config)
        self.text_tower = TextTower(config)
        self.neck = CausalNeck(config)
        self.head = MaskHead(config)
        self.confounding_head = MaskHead(config)

    def forward(self, image: Tensor, tokens: Tensor) -> Logits:
        features = self.neck(self.image_tower(image))
        state = self.text_tower(tokens)
        return Logits(self.head(features.causal, state), self.confounding_head(features.confounding, state))

    def causal_logits(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Return only the causal logits, for inference: (B, 1, H, W)."""
        features = self.neck.causal_features(self.image_tower(image))
        logits: Tensor = self.head(features, self.text_tower(tokens))
        return logits
