"""The Typer application: every command, each in a module of its own."""

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

app = typer.Typer(
    name="cclip-deploy",
    help="From a CausalCLIPSeg checkpoint to ONNX Runtime and TensorRT engines that are proved equal to it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cclip-deploy {__version__}")
        raise typer.Exit()


@app.callback()
def cclip_deploy(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """From a CausalCLIPSeg checkpoint to ONNX Runtime and TensorRT engines that are proved equal to it."""


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
