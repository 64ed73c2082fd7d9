"""`cclip-deploy synth`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, tell_every
from cclip_deploy.common.paths import check_writable


@reports_errors
def synth(
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", show_default=False)],
    layout: Annotated[
        Literal["flat", "jsonl", "qata", "mosmed", "languidemedseg", "medvlsm"],
        typer.Option(help="Layout to write; qata and mosmed are LViT's."),
    ] = "flat",
    images: Annotated[
        int, typer.Option(help="Films: four fifths train (a fifth of them val), the rest test.", min=5)
    ] = 500,
    size: Annotated[int, typer.Option(help="Height and width in pixels.", min=32, max=1024)] = 224,
    prompts_per_image: Annotated[int, typer.Option(help="Prompts for each film, each with its mask.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.", min=0)] = 0,
    confounder: Annotated[
        list[str] | None,
        typer.Option(
            help="marker, text, collimation, gain or blur, to follow the target's side; may be given several times."
        ),
    ] = None,
    confounder_rho: Annotated[
        float | None,
        typer.Option(
            help="How often signs follow the target; 0.95 unless given. Alone it means all signs.", min=0, max=1
        ),
    ] = None,
    test_rho: Annotated[float | None, typer.Option(help="The same in the test split.", min=0, max=1)] = None,
    absent_share: Annotated[
        float, typer.Option(help="Share of prompts for sites without a lesion.", min=0, max=1)
    ] = 0.0,
    typo_share: Annotated[float, typer.Option(help="Share of prompts with a typing error.", min=0, max=1)] = 0.0,
    wordings: Annotated[
        Literal["qata", "varied"],
        typer.Option(help="Prompts in QaTa-COV19's form alone, or in several wordings; the images stay the same."),
    ] = "qata",
    json: options.Json = False,
) -> None:
    """Draw a [bold]synthetic data set[/]: films, prompts, masks, with confounders that can be switched on."""
    from cclip_deploy.datasets.synthetic.confounders import make_confounding
    from cclip_deploy.datasets.synthetic.generator import SyntheticOptions, split_counts, write_dataset

    asking = SyntheticOptions(make_confounding(confounder or (), confounder_rho), absent_share, typo_share, wordings)
    counts = split_counts(images)
    check_writable(output)
    with progress(quiet=json) as tell:
        write_dataset(
            output, counts, (size, size), seed, prompts_per_image=prompts_per_image, layout=layout, options=asking,
            test_rho=test_rho, on_progress=tell_every(tell, "Film"),
        )  # fmt: skip
    if json:
        print_json({"folder": str(output), "layout": layout, "films": counts, "seed": seed})
        return
    shares = ", ".join(f"{count} {split}" for split, count in counts.items())
    stdout.print(f"{output}: {images} films ({shares}), layout {layout}", markup=False)
