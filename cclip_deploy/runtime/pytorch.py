"""PyTorch backend: the published network without rewrites, the reference for all other backends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cclip_deploy.errors import UsageError
from cclip_deploy.model.head import prompt_kernel_rows
from cclip_deploy.model.network import CausalCLIPSeg
from cclip_deploy.runtime.backend import Arrays


class PyTorchBackend:
    """Computes every graph with the plain network."""

    name = "pytorch"
    precision = "fp32"

    def __init__(self, model: CausalCLIPSeg) -> None:
        self.model = model.eval()

    def load(self, graph: str) -> None:
        """Do nothing: the weights are in memory."""

    def unload(self, graph: str) -> None:
        """Do nothing: all graphs share the weights."""

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        compute: dict[str, Callable[..., dict[str, Tensor]]] = {
            "prompt_encoder": self._prompt_encoder,
            "image_encoder": self._image_encoder,
            "mask_decoder": self._mask_decoder,
            "fused": self._rows,
            "plain": self._rows,
        }
        if graph not in compute:
            raise UsageError(f"PyTorch has no graph {graph!r}; it has {', '.join(compute)}.")
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
            return {name: value.numpy() for name, value in compute[graph](**tensors).items()}

    def all_pairs(self, image: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of every prompt on every image, (B, P, H, W), with one image pass per image."""
        with torch.inference_mode():
            states = self.model.text_tower(torch.from_numpy(tokens))
            head, rows = self.model.head, []
            for row in torch.from_numpy(image).unsqueeze(1):
                features = head.upsample(self.model.neck.causal_features(self.model.image_tower(row)))
                rows.append(torch.cat([head.apply_prompt(features, state) for state in states.unsqueeze(1)], dim=1))
            return torch.cat(rows).numpy()

    def _rows(self, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model.causal_logits(image, tokens)}

    def _image_encoder(self, image: Tensor) -> dict[str, Tensor]:
        neck = self.model.neck(self.model.image_tower(image))
        masks = {f"mask{level}": mask for level, mask in zip((3, 4, 5), neck.masks, strict=True)}
        features = self.model.head.upsample(neck.causal).permute(0, 2, 3, 1).contiguous()  # (B, H, W, 256)
        return {"features": features, **masks, "confounding_features": neck.confounding}

    def _prompt_encoder(self, tokens: Tensor) -> dict[str, Tensor]:
        """Fold the last 1x1 convolution (W1, b1) into the kernel K like the exported graphs: K W1, K b1, b."""
        head = self.model.head
        kernel = head.kernel(self.model.text_tower(tokens))
        rows = prompt_kernel_rows(kernel.weight)  # (P, 9, 256)
        return {"kernel": rows @ head.mix.weight.flatten(1), "tap_bias": rows @ head.mix.bias, "bias": kernel.bias}  # type: ignore[operator]

    def _mask_decoder(self, features: Tensor, kernel: Tensor, tap_bias: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """Convolve with the kernel of each prompt; the tap biases are the weights of an additional channel of ones."""
        features = features.permute(0, 3, 1, 2)
        ones = torch.ones_like(features[:, :1])
        weight = torch.cat([kernel, tap_bias.unsqueeze(2)], dim=2)  # (P, 9, 257)
        weight = weight.transpose(1, 2).reshape(len(weight), -1, 3, 3)
        return {"logits": torch.nn.functional.conv2d(torch.cat([features, ones], dim=1), weight, bias, padding=1)}
