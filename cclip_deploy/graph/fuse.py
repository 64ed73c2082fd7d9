"""Join the traced encoders and the row decoder into the `fused` graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def fuse(
    image_encoder: onnx.ModelProto, prompt_encoder: onnx.ModelProto, row_decoder: onnx.ModelProto
) -> onnx.ModelProto:
    """Join three traced graphs into `fused`: image (B, 3, H, W) and tokens (B, L) -> logits (B, 1, H, W)."""
    from onnx import compose

    text = _per_image(compose.add_prefix(prompt_encoder, "prompt_encoder/", rename_inputs=False, rename_outputs=False))
    image = compose.add_prefix(image_encoder, "image_encoder/", rename_inputs=False, rename_outputs=False)
    decoder = compose.add_prefix(row_decoder, "row_decoder/", rename_inputs=True, rename_outputs=False)
    kernel = ("kernel", "tap_bias", "bias")
    joined = compose.merge_models(
        image, decoder, [("features", "row_decoder/features")], outputs=["logits"],
    )  # fmt: skip
    fused: onnx.ModelProto = compose.merge_models(
        text, joined, [(name, f"row_decoder/{name}") for name in kernel], outputs=["logits"]
    )
    _order_inputs(fused, ("image", "tokens"))
    fused.graph.name = "fused"
    fused.producer_name, fused.producer_version = image_encoder.producer_name, image_encoder.producer_version
    del fused.opset_import[1:]  # merge_models adds one entry per part
    return fused


def _per_image(prompt_encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Rename the symbolic dimension `prompts` to `batch`: the fused graph takes one prompt per image."""
    graph = prompt_encoder.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if "prompts" in dimension.dim_param:
                dimension.dim_param = dimension.dim_param.replace("prompts", "batch")
    return prompt_encoder


def _order_inputs(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    inputs = {value.name: value for value in model.graph.input}
    ordered = [inputs[name] for name in names]
    del model.graph.input[:]
    model.graph.input.extend(ordered)
