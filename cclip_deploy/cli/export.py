"""The command `cclip-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.numbers import si


@reports_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .safetensors, or .pth in the published layout.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")],
    image_size: options.ImageSize = None,
    prompt_length: Annotated[
        int | None, typer.Option(help="Number of tokens of a prompt, 3 to 77. Default: that of the training, else 32.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain/--deploy-form", help="One graph in the published order of operations."),
    ] = False,
    batch: Annotated[int, typer.Option(help="Batch size of the plain graph, which is static.")] = 1,
    with_masks: Annotated[bool, typer.Option(help="Output the causal masks, too.", show_default=False)] = False,
    with_confounding: Annotated[
        bool, typer.Option(help="Output the confounding features, too.", show_default=False)
    ] = False,
    reference_image: Annotated[
        list[Path] | None, typer.Option(help="Image to record reference outputs for; may be repeated.")
    ] = None,
    reference_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to record reference outputs for; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Export a checkpoint to a [bold]bundle[/] of ONNX graphs and compare every graph with PyTorch."""
    from cclip_deploy.export.export import ExportOptions, export_bundle
    from cclip_deploy.model.config import image_hw

    chosen = ExportOptions(
        image_hw=None if image_size is None else image_hw(image_size),
        prompt_length=prompt_length, plain=plain, batch=batch,
        with_masks=with_masks, with_confounding=with_confounding, threads=threads, replace=force,
        reference_images=tuple(reference_image or ()), reference_prompts=tuple(reference_prompt or ()),
    )  # fmt: skip
    with progress(quiet=json) as on_progress:
        exported = export_bundle(checkpoint, output, chosen, command_line(), on_progress)
    graphs = exported.bundle.manifest.graphs
    worst = {n: max(c.value for c in exported.checks if c.graph == n and c.metric == "relative_error") for n in graphs}
    if json:
        rows = {name: {"multiply_adds": e.multiply_adds, "relative_error": worst[name]} for name, e in graphs.items()}
        print_json({"bundle": str(output), "tensors_dropped": exported.tensors_dropped, "graphs": rows}, "export")
        return
    shown = table(f"{output}, compared with PyTorch", "graph", "multiply-adds ", "size ", "relative error ")
    for name, entry in graphs.items():
        size = (output / entry.file).stat().st_size
        shown.add_row(name, si(entry.multiply_adds), si(size, "B"), f"{worst[name]:.1e}")
    stdout.print(shown)
    if exported.tensors_dropped:
        stdout.print(
            f"{exported.tensors_dropped} tensors of the checkpoint were dropped; the network does not use them."
        )
