"""The Typer application and its commands; each command has its own module."""

from __future__ import annotations

from typing import Annotated

import typer

from cclip_deploy import __version__
from cclip_deploy.cli import (
    ablate,
    bench,
    build_engine,
    data,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    predict,
    prompt,
    synth,
    train,
    tune_precision,
    verify,
)

HELP = "Deploy CausalCLIPSeg checkpoints to ONNX Runtime, OpenVINO and TensorRT, verified against PyTorch."

app = typer.Typer(
    name="cclip-deploy",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cclip-deploy {__version__}")
        raise typer.Exit()


@app.callback(help=HELP)
def cclip_deploy(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Handle the options given before a command."""


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("ablate")(ablate.ablate)
app.command("export")(export.export)
app.command("build-engine")(build_engine.build_engine)
app.command("tune-precision")(tune_precision.tune_precision)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("predict")(predict.predict)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("data")(data.data)
app.command("prompt")(prompt.prompt)
app.command("synth")(synth.synth)
