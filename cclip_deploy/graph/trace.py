"""Trace modules to ONNX graphs with named inputs, outputs and dynamic dimensions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cclip_deploy import __version__
from cclip_deploy.errors import ParityError
from cclip_deploy.graph.deploy import DeployForm
from cclip_deploy.model.config import ModelConfig
from cclip_deploy.model.head import TAPS
from cclip_deploy.model.network import CausalCLIPSeg

if TYPE_CHECKING:
    import onnx

OPSET = 18
# Example sizes are above one, because the exporter treats a size of one as a constant.
TRACED_BATCH, TRACED_PROMPTS = 2, 3


@dataclass(frozen=True)
class GraphPlan:
    """A module to trace, with example inputs by name, dynamic dimensions and output names."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    output_dimensions: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class _CausalPath(nn.Module):
    """The published order of operations, without the branch whose logits are unused at inference."""

    def __init__(self, model: CausalCLIPSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        return self.model.causal_logits(image, tokens)


def plan_deploy_graphs(
    form: DeployForm, config: ModelConfig, image_hw: tuple[int, int], prompt_length: int
) -> list[GraphPlan]:
    """Return the plans of a deploy form: both encoders, the mask decoder, and the row decoder that `fuse` needs."""
    image = _examples(image_hw, prompt_length, TRACED_BATCH)[0]
    prompts = _examples(image_hw, prompt_length, TRACED_PROMPTS)[1]
    width = config.feature_width
    features = {"features": torch.rand(TRACED_BATCH, *image_hw, width)}
    kernels, row_kernels = (
        {"kernel": torch.rand(rows, TAPS, width), "tap_bias": torch.rand(rows, TAPS), "bias": torch.rand(rows)}
        for rows in (TRACED_PROMPTS, TRACED_BATCH)
    )
    encoder = form.image_encoder
    image_outputs = (
        "features",
        *(("mask3", "mask4", "mask5") if encoder.with_masks else ()),
        *(("confounding_features",) if encoder.with_confounding else ()),
    )
    batch, per_prompt = {0: "batch"}, {0: "prompts"}
    return [
        GraphPlan(
            "prompt_encoder", form.prompt_encoder, {"tokens": prompts}, {"tokens": per_prompt},
            ("kernel", "tap_bias", "bias"), dict.fromkeys(("kernel", "tap_bias", "bias"), per_prompt),
        ),
        GraphPlan(
            "image_encoder", encoder, {"image": image}, {"image": batch},
            image_outputs, dict.fromkeys(image_outputs, batch),
        ),
        GraphPlan(
            "mask_decoder", form.mask_decoder, {**features, **kernels},
            {"features": batch, **dict.fromkeys(kernels, per_prompt)},
            ("logits",), {"logits": {0: "batch", 1: "prompts"}},
        ),
        GraphPlan(
            "row_decoder", form.row_decoder, {**features, **row_kernels},
            {"features": batch, **dict.fromkeys(row_kernels, batch)}, ("logits",), {"logits": batch},
        ),
    ]  # fmt: skip


def plan_plain_graph(model: CausalCLIPSeg, image_hw: tuple[int, int], prompt_length: int, batch: int) -> GraphPlan:
    """Return the plan of the network in the published order of operations, as one graph.

    Its batch is static, because the weights of its last convolution are computed at run time.
    """
    image, tokens = _examples(image_hw, prompt_length, batch)
    return GraphPlan("plain", _CausalPath(model).eval(), {"image": image, "tokens": tokens}, {}, ("logits",))


def trace(plan: GraphPlan) -> onnx.ModelProto:
    """Export one graph with PyTorch's dynamo exporter and name its output dimensions."""

    dims = {name: torch.export.Dim(name, min=1, max=65536) for name in _symbols(plan)}
    shapes = {name: {axis: dims[s] for axis, s in plan.dynamic.get(name, {}).items()} for name in plan.inputs}
    with _quiet():
        program = torch.onnx.export(
            plan.module,
            tuple(plan.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(plan.inputs),
            output_names=list(plan.outputs),
            dynamic_shapes=tuple(shapes.values()) if dims else None,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ParityError(f"PyTorch's exporter returned no graph for {plan.name}. Is this torch version supported?")
    model: onnx.ModelProto = program.model_proto
    _name_output_dimensions(model, plan)
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    model.graph.name = plan.name
    model.producer_name, model.producer_version = "cclip-deploy", __version__
    return model


def _examples(image_hw: tuple[int, int], prompt_length: int, rows: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(rows, prompt_length, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, 320, 49407
    return torch.rand(rows, 3, *image_hw), tokens


def _symbols(plan: GraphPlan) -> Sequence[str]:
    return sorted({symbol for axes in plan.dynamic.values() for symbol in axes.values()})


def _name_output_dimensions(model: onnx.ModelProto, plan: GraphPlan) -> None:
    """Replace the expressions that the exporter derives for output dimensions by their names."""
    for output in model.graph.output:
        for axis, symbol in plan.output_dimensions.get(output.name, {}).items():
            dimension = output.type.tensor_type.shape.dim[axis]
            dimension.Clear()
            dimension.dim_param = symbol


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of the exporter about its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
