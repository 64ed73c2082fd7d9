"""The Typer application and its commands; each command has its own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.text import Text
from typer import rich_utils
from typer.core import TyperGroup

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
    options,
    predict,
    prompt,
    recipes,
    synth,
    train,
    tune_precision,
    verify,
)
from cclip_deploy.cli.console import print_json_error, reports_errors, set_verbosity, start_output
from cclip_deploy.errors import UsageError

ParseError: Any = typer.BadParameter.__base__
"""Class of all errors in a command line, which Typer does not export."""

HELP = "Deploy CausalCLIPSeg checkpoints to ONNX Runtime, OpenVINO and TensorRT, verified against PyTorch."


class _FoldedNames(rich_utils.OptionHighlighter):
    """Highlighter of option names that wraps a name which is too long for its column instead of cutting it."""

    def __call__(self, text: str | Text) -> Text:
        highlighted = super().__call__(text)
        highlighted.overflow = "fold"
        return highlighted


class _FoldedNegativeNames(_FoldedNames, rich_utils.NegativeOptionHighlighter):
    """The same for the names that switch an option off."""


rich_utils.highlighter, rich_utils.negative_highlighter = _FoldedNames(), _FoldedNegativeNames()


class _Commands(TyperGroup):
    """Group of commands; with --json, a command line that cannot be parsed is reported as JSON, too."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        given = list(args)
        start_output()
        with _parse_errors_as_json("--json" in given):
            context = super().make_context(info_name, args, *rest, **extra)
            context.meta["json"] = "--json" in given
            return context

    def invoke(self, ctx: Any) -> Any:
        with _parse_errors_as_json(ctx.meta["json"]):
            return super().invoke(ctx)


@contextmanager
def _parse_errors_as_json(requested: bool) -> Iterator[None]:
    try:
        yield
    except ParseError as error:
        if requested:
            print_json_error(UsageError.__name__, error.format_message(), error.exit_code)
        raise


app = typer.Typer(
    cls=_Commands,
    name="cclip-deploy",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cclip-deploy {__version__}")
        raise typer.Exit()


@app.callback(help=HELP)
@reports_errors
def cclip_deploy(
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Handle the options given before a command."""
    set_verbosity(quiet, verbose)


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"demo": demo.demo, "doctor": doctor.doctor},
    "Deploy": {
        "export": export.export,
        "tune-precision": tune_precision.tune_precision,
        "build-engine": build_engine.build_engine,
        "predict": predict.predict,
    },
    "Check": {
        "inspect": inspect.inspect,
        "verify": verify.verify,
        "bench": bench.bench,
        "evaluate": evaluate.evaluate,
    },
    "Data and training": {
        "data": data.data,
        "synth": synth.synth,
        "prompt": prompt.prompt,
        "recipes": recipes.recipes,
        "train": train.train,
        "ablate": ablate.ablate,
    },
}
"""Commands by the panel of the help that lists them."""

for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(options.with_verbosity(command))
