"""Coordinate channels of a convolution as a constant map, because they do not depend on the image."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cclip_deploy.graph.rewrites.batch_norm import convolution_refusal, fold, norm_refusal
from cclip_deploy.graph.rewrites.rewrite import Rewrite
from cclip_deploy.model.neck import CoordinateBlock, coordinate_channels


class PlacedConvolution(nn.Module):
    """Convolution plus a constant map (1, C, h, w), the contribution of the coordinate channels, followed by a ReLU."""

    place: Tensor

    def __init__(self, weight: Tensor, place: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("place", place)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h, w)
        return functional.relu(functional.conv2d(x, self.weight, padding=1) + self.place)


class FixCoordinates(Rewrite[CoordinateBlock]):
    """CoordinateBlock -> PlacedConvolution for maps of one size."""

    def __init__(self, map_hw: tuple[int, int]) -> None:
        self.map_hw = map_hw

    def refusal(self, module: CoordinateBlock) -> str | None:
        return convolution_refusal(module.block[0], 3) or norm_refusal(module.block[1])

    def replacement(self, module: CoordinateBlock) -> nn.Module:
        convolution, norm = module.block[0], module.block[1]
        dtype = convolution.weight.dtype
        weight, bias = fold(convolution, norm)  # type: ignore[arg-type]
        place = coordinate_channels(self.map_hw, weight)  # (1, 2, h, w): x, then y, after the input's channels
        place_map = functional.conv2d(place, weight[:, -2:], bias, padding=1)
        return PlacedConvolution(weight[:, :-2].to(dtype).contiguous(), place_map.to(dtype))  # type: ignore[arg-type]
