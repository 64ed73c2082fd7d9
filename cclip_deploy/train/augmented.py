"""Batches changed at random: films, masks and prompts together, the same for the same seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.data.augment import Augmentation, apply_change, draw_change
from cclip_deploy.data.preprocess import Preprocessing
from cclip_deploy.data.tokens import PromptTokenizer

Floats = NDArray[np.float32]


def augment_batch(
    rng: np.random.Generator,
    augmentation: Augmentation,
    images: Floats,
    masks: NDArray[np.bool_],
    texts: list[tuple[str, ...]],
    tokenizer: PromptTokenizer,
    prompt_length: int,
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int64]]:
    """One change an image: (B, 3, H, W) normalised, (B, P, H, W), B × P texts → images, masks, tokens (B, P, L)."""
    preprocessing = Preprocessing()
    mean, std = (np.array(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    new_images, new_masks, new_tokens = [], [], []
    for image, of_image, words in zip(images, masks, texts, strict=True):
        pixels = np.clip(image.transpose(1, 2, 0) * std + mean, 0, 1)  # (H, W, 3)
        pixels, of_image, words = apply_change(draw_change(rng, augmentation), pixels, of_image, words)
        new_images.append(((pixels - mean) / std).transpose(2, 0, 1))
        new_masks.append(of_image)
        new_tokens.append(np.stack([tokenizer.encode_cut(text, prompt_length) for text in words]))
    return np.stack(new_images).astype(np.float32), np.stack(new_masks), np.stack(new_tokens)
