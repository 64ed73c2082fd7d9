"""What the numerical tests share: random weights of which none is neutral, and the distance between two answers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def randomized(module: M, seed: int = 0) -> M:
    """The module in float64 and evaluation mode, all weights and statistics random, activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            tensor.normal_(0, (1.5 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    return module


def random_map(*shape: int, seed: int = 0) -> Tensor:
    """A float64 map of unit variance whose border differs from its inside in no way."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖a - b‖ / ‖b‖ in float64; a b that a ReLU left next to nothing of counts as 0.01 an element."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{tuple(actual.shape)} is not {tuple(expected.shape)}")
    least = 0.01 * expected.numel() ** 0.5
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=least))
