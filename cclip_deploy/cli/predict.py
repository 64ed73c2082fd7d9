"""`cclip-deploy predict`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table


@reports_errors
def predict(
    bundle: options.Bundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures or folders: PNG, JPEG, TIFF, BMP, DICOM.")],
    prompt: Annotated[list[str], typer.Option(help="What to segment; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for masks and overlays.")] = Path(
        "predictions"
    ),
    threshold: Annotated[float | None, typer.Option(help="Probability from which a pixel counts.")] = None,
    backend: options.Backend = "onnxruntime",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Segment what the prompts name: [bold]mask, probability and overlay[/] in the picture's own size."""
    from cclip_deploy.bundle import Bundle
    from cclip_deploy.pipeline.predict import predict as run
    from cclip_deploy.pipeline.predict import refuse_failures
    from cclip_deploy.runtime.choice import open_backend
    from cclip_deploy.segmenter import Segmenter

    opened = Bundle.open(bundle)
    segmenter = Segmenter(opened, open_backend(backend, opened, "fp32", device, threads))
    with progress(quiet=json) as tell:
        found = run(segmenter, images, prompt, output, threshold, lambda p, n, total: tell(f"{n} of {total}: {p}"))
    if json:
        failed = [{"image": str(path), "error": reason} for path, reason in found.failed]
        print_json({"predictions": [row.to_dict() for row in found.done], "failed": failed})
    else:
        shown = table("Predictions", "picture", "prompt", "area ", "mean probability ", "mask")
        for row in found.done:
            numbers = (f"{row.area_share:.2%}", f"{row.mean_probability:.3f}")
            shown.add_row(escape(row.image.name), escape(row.prompt), *numbers, escape(str(row.written.mask)))
        stdout.print(shown)
    refuse_failures(found)
