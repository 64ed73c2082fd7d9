"""`cclip-deploy export`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import command_line, print_json, progress, reports_errors, si, stdout, table


@reports_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Ours (.safetensors) or the published layout (.pth).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to make, a folder.")],
    image_size: Annotated[
        str | None, typer.Option(help="N or HxW, multiples of 32; as it was trained (else 224) unless given.")
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens a prompt has room for, 3 to 77; as trained (else 32) unless given.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain/--deploy-form", help="The published order of operations, one graph, as a reference."),
    ] = False,
    batch: Annotated[int, typer.Option(help="Static batch of the plain graph.")] = 1,
    with_masks: Annotated[bool, typer.Option(help="Causal masks as outputs of the image encoder.")] = False,
    with_confounding: Annotated[bool, typer.Option(help="Confounding features as an output, too.")] = False,
    reference_image: Annotated[
        list[Path] | None, typer.Option(help="Picture to record reference answers on; may be repeated.")
    ] = None,
    reference_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to record them for; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a bundle that is there already.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Make a [bold]bundle[/] of a checkpoint: ONNX graphs, each compared with PyTorch before it is published."""
    from cclip_deploy.export.export import ExportOptions, export_bundle
    from cclip_deploy.model.config import image_hw

    chosen = ExportOptions(
        image_hw=None if image_size is None else image_hw(image_size),
        prompt_length=prompt_length, plain=plain, batch=batch,
        with_masks=with_masks, with_confounding=with_confounding, threads=threads, replace=force,
        reference_images=tuple(reference_image or ()), reference_prompts=tuple(reference_prompt or ()),
    )  # fmt: skip
    with progress(quiet=json) as tell:
        made = export_bundle(checkpoint, output, chosen, command_line(), tell)
    graphs = made.bundle.manifest.graphs
    worst = {n: max(c.value for c in made.checks if c.graph == n and c.metric == "relative_error") for n in graphs}
    if json:
        rows = {name: {"multiply_adds": e.multiply_adds, "relative_error": worst[name]} for name, e in graphs.items()}
        print_json({"bundle": str(output), "tensors_dropped": made.tensors_dropped, "graphs": rows})
        return
    shown = table(f"{output}, equal to PyTorch", "graph", "multiply-adds ", "size ", "relative error ")
    for name, entry in graphs.items():
        size = (output / entry.file).stat().st_size
        shown.add_row(name, si(entry.multiply_adds), si(size, "B"), f"{worst[name]:.1e}")
    stdout.print(shown)
    if made.tensors_dropped:
        stdout.print(
            f"{made.tensors_dropped} tensors of the checkpoint were dropped: the published network never uses them."
        )
