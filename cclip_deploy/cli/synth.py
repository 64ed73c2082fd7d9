"""The command `cclip-deploy synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, report_every, reports_errors, stdout
from cclip_deploy.common.paths import check_writable


@reports_errors
def synth(
    output: Annotated[Path, typer.Argument(help="Output folder; must not exist.", show_default=False)],
    layout: Annotated[
        Literal["flat", "jsonl", "qata", "mosmed", "languidemedseg", "medvlsm"],
        typer.Option(help="Layout of the data set; qata and mosmed are those of LViT."),
    ] = "flat",
    images: Annotated[int, typer.Option(help="Number of images: 64 % train, 16 % val, 20 % test.", min=5)] = 500,
    size: Annotated[int, typer.Option(help="Height and width of the images in pixels.", min=32, max=1024)] = 224,
    prompts_per_image: Annotated[int, typer.Option(help="Prompts for each image, each with its own mask.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same files.", min=0)] = 0,
    confounder: Annotated[
        list[str] | None,
        typer.Option(
            help="Confounder that follows the target's side: marker, text, collimation, gain or blur; may be repeated."
        ),
    ] = None,
    confounder_rho: Annotated[
        float | None,
        typer.Option(
            help="Probability that a confounder agrees with the target. Default: 0.95. Without --confounder: all "
            "confounders.",
            min=0,
            max=1,
        ),
    ] = None,
    test_rho: Annotated[
        float | None, typer.Option(help="Probability of agreement in the test split.", min=0, max=1)
    ] = None,
    absent_share: Annotated[
        float, typer.Option(help="Fraction of prompts that name a site without a lesion.", min=0, max=1)
    ] = 0.0,
    typo_share: Annotated[float, typer.Option(help="Fraction of prompts with a typing error.", min=0, max=1)] = 0.0,
    wordings: Annotated[
        Literal["qata", "varied"],
        typer.Option(help="Prompts in the form of QaTa-COV19, or in varied wordings. The images are the same."),
    ] = "qata",
    json: options.Json = False,
) -> None:
    """Generate a [bold]synthetic data set[/] of chest radiographs with prompts, masks and optional confounders."""
    from cclip_deploy.datasets.synthetic.confounders import make_confounding
    from cclip_deploy.datasets.synthetic.generator import SyntheticOptions, split_counts, write_dataset

    asking = SyntheticOptions(make_confounding(confounder or (), confounder_rho), absent_share, typo_share, wordings)
    counts = split_counts(images)
    check_writable(output)
    with progress(quiet=json) as on_progress:
        write_dataset(
            output, counts, (size, size), seed, prompts_per_image=prompts_per_image, layout=layout, options=asking,
            test_rho=test_rho, on_progress=report_every(on_progress, "Image"),
        )  # fmt: skip
    if json:
        print_json({"folder": str(output), "layout": layout, "films": counts, "seed": seed}, "synth")
        return
    splits = ", ".join(f"{count} {split}" for split, count in counts.items())
    stdout.print(f"{output}: {images} images ({splits}), layout {layout}", markup=False)
