"""A network in PyTorch as `scores.evaluate_dice` asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.data.preprocess import Preprocessing, to_input, to_source
from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.train.config import TrainConfig
from cclip_deploy.train.scores import Predict

if TYPE_CHECKING:
    from cclip_deploy.model.network import CausalCLIPSeg


def torch_predictor(model: CausalCLIPSeg, tokenizer: PromptTokenizer, config: TrainConfig) -> Predict:
    """How `evaluate_dice` asks a network in PyTorch; it is put into evaluation mode."""
    import torch

    model.eval()

    def predict(pixels: NDArray[np.float32], prompt: str) -> NDArray[np.float32]:
        image = torch.from_numpy(to_input(pixels, config.image_hw, Preprocessing()))
        tokens = torch.from_numpy(tokenizer.encode(prompt, config.prompt_length))[None]
        with torch.inference_mode():
            probability = model.causal_logits(image, tokens).sigmoid()[0, 0].numpy()
        return to_source(probability, (pixels.shape[0], pixels.shape[1]))

    return predict
