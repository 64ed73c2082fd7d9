"""Tests of the whole program: help, exit codes, error messages, JSON output, signals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from cclip_deploy import __version__, errors
from cclip_deploy.cli import console
from cclip_deploy.cli.console import command_line, image_progress, print_json, progress, reports_errors, table
from cclip_deploy.common.numbers import si
from tests.cli.run import PROGRAM, interrupt_import, invoke, run

COMMANDS = [
    "demo", "train", "evaluate", "ablate", "export", "build-engine", "tune-precision", "verify", "bench", "predict",
    "inspect", "doctor", "data", "prompt", "synth",
]  # fmt: skip


def test_the_installed_program_shows_version_and_commands() -> None:
    assert run("--version").stdout == f"cclip-deploy {__version__}\n"
    helped = run("--help")
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in COMMANDS)
    assert run("-h").stdout == helped.stdout
    assert run("-V").stdout == run("--version").stdout


def test_completion_scripts_can_be_shown_and_complete_commands() -> None:
    shell = subprocess.run(["bash", "-c", f"{PROGRAM} --show-completion; true"], capture_output=True, text=True)
    assert "complete -o default -F _cclip_deploy_completion cclip-deploy" in shell.stdout
    asked = {"_CCLIP_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "cclip-deploy pre", "COMP_CWORD": "1"}
    assert run(env=asked).stdout.split() == ["predict"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_cuts_no_name_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    shown = invoke(*command.split(), "-h").stdout
    assert max(map(len, shown.splitlines())) == 80
    assert "…" not in shown


@pytest.mark.parametrize(
    ("arguments", "level"), [("-q prompt x", -1), ("prompt x -q", -1), ("prompt x", 0), ("prompt x -v", 1)]
)
def test_verbosity_is_an_option_before_or_after_the_command(arguments: str, level: int) -> None:
    assert invoke(*arguments.split()).exit_code == 0
    assert console.verbosity() == level
    assert invoke("prompt", "x", "-q", "-v").exit_code == 2


@pytest.mark.parametrize("show", [progress, image_progress])
def test_quiet_prints_no_progress(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_verbosity(quiet=True, verbose=False)
    try:
        with show(False) as report:
            report(*((Path("a.png"), 1, 2) if show is image_progress else ("Reading",)))
    finally:
        console.set_verbosity(quiet=False, verbose=False)
    assert capsys.readouterr().err == ""


def test_a_long_path_does_not_change_the_width_of_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(path: str) -> list[str]:
        terminal = Console(file=io.StringIO(), width=80, force_terminal=True)
        monkeypatch.setattr(console, "stderr", terminal)
        with image_progress(False) as report:
            report(Path(path), 1, 40)
        assert isinstance(terminal.file, io.StringIO)
        plain = Text.from_ansi(terminal.file.getvalue()).plain
        return [line for line in plain.splitlines() if "1 of 40" in line]

    short, long = drawn("a.png"), drawn("folder/" * 40 + "a.png")
    assert short[-1].index("1 of 40") == long[-1].index("1 of 40")
    assert max(map(len, long)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        "frobnicate", "inspect", "predict bundle", "predict bundle a.png", "bench b --rounds 2", "export a.pth",
        "build-engine b --backend abacus", "verify b --threads 0",
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_parsed_ends_with_2(arguments: str) -> None:
    assert invoke(*arguments.split()).exit_code == 2


EXIT_CODES = {
    "UsageError": 2, "PromptError": 2, "PrecisionNotSupported": 2, "EnvironmentIssue": 3, "TargetInUse": 3,
    "ParityError": 4, "DataError": 6, "CheckpointError": 6, "BundleError": 6, "ImageError": 6,
    "RewriteRefused": 1, "CclipError": 1,
}  # fmt: skip


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @reports_errors
    def fail() -> None:
        raise error

    return app


@pytest.mark.parametrize("name", EXIT_CODES)
def test_an_error_prints_one_message_and_sets_its_exit_code(name: str) -> None:
    done = CliRunner().invoke(app_that_raises(getattr(errors, name)("Say [what] to do: [/b] x[0]. " * 20)), [])
    assert done.exit_code == EXIT_CODES[name]
    assert done.stderr == "Error: " + "Say [what] to do: [/b] x[0]. " * 20 + "\n"
    assert done.stdout == ""


def test_every_error_has_its_exit_code() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == EXIT_CODES.keys()


def test_ctrl_c_ends_with_130_and_a_bug_keeps_its_traceback() -> None:
    done = CliRunner().invoke(app_that_raises(KeyboardInterrupt()), [])
    assert (done.exit_code, done.stderr) == (130, "Interrupted; nothing was left half-written.\n")
    done = CliRunner().invoke(app_that_raises(ZeroDivisionError("bug")), [])
    assert isinstance(done.exception, ZeroDivisionError)


def test_with_json_an_error_is_one_document_on_standard_output(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "none.cclip", "--json")
    assert done.returncode == 6
    assert json.loads(done.stdout) == {
        "schema": "cclip-deploy/error/1",
        "error": {"type": "BundleError", "message": done.stderr.removeprefix("Error: ").strip(), "exit_code": 6},
    }
    assert done.stderr.startswith("Error: There is no bundle at ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["inspect --json", "frobnicate --json", "inspect b --json --abacus", "--json"])
def test_with_json_a_command_line_that_cannot_be_parsed_is_reported_as_json(arguments: str) -> None:
    done = invoke(*arguments.split())
    found = json.loads(done.stdout)
    assert done.exit_code == 2
    assert (found["schema"], found["error"]["type"], found["error"]["exit_code"]) == (
        "cclip-deploy/error/1", "UsageError", 2,
    )  # fmt: skip
    assert found["error"]["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect none", "predict none a.png --prompt x", "export none.pth -o out", "train none.toml",
        "ablate none.toml",
        "data none", "evaluate b none", "prompt x --bundle none", "verify none", "bench none",
    ],
)  # fmt: skip
def test_a_missing_file_ends_with_6_whatever_it_is(
    arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments.split())
    assert done.exit_code == 6, done.stderr
    assert "none" in done.stderr


@pytest.mark.parametrize("exists", [True, False])
def test_a_checkpoint_in_place_of_a_bundle_is_not_proposed_as_output(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "up0.pth"
    if exists:
        path.write_bytes(b"x")
    done = invoke("predict", path, "a.png", "--prompt", "x")
    assert done.exit_code == 6
    assert "-o up0.cclip" in done.stderr


def test_print_json_writes_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "[bold]ä[/]", "list": [1.5, None]}, "data")
    assert json.loads(capsys.readouterr().out) == {
        "schema": "cclip-deploy/data/1",
        "text": "[bold]ä[/]",
        "list": [1.5, None],
    }


def test_titles_and_progress_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    made = table("films[1]/[/b].cclip :lung:", "name", "size ")
    made.add_row("a" * 40, "1")
    console.stdout.print(made)
    assert "films[1]/[/b].cclip :lung:" in capsys.readouterr().out
    assert [column.justify for column in made.columns] == ["left", "right"]
    with progress(quiet=False) as tell:
        tell("Reading a[0]/[/x].png :lung:")
    assert capsys.readouterr().err == "Reading a[0]/[/x].png :lung:\n"
    with progress(quiet=True) as tell:
        tell("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "unit", "shown"),
    [
        (21_400_000_000, "", "21.4 G"),
        (85_300_000, "B", "85.3 MB"),
        (1000, "B", "1 kB"),
        (999, "B", "999 B"),
        (7, "", "7"),
    ],
)
def test_numbers_are_shown_with_three_digits(count: float, unit: str, shown: str) -> None:
    assert si(count, unit) == shown


def test_command_line_is_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/cclip-deploy", "predict", "a b.png", "--prompt", "it's"])
    assert command_line() == """cclip-deploy predict 'a b.png' --prompt 'it'"'"'s'"""


def test_a_closed_pipe_ends_the_program_without_a_traceback(tmp_path: Path) -> None:
    """`cclip-deploy doctor --json | head -1` ends normally."""
    done = subprocess.run(
        f"'{PROGRAM}' doctor --json | head -1", shell=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "{"
    assert "Traceback" not in done.stderr


def swallow_ctrl_c(instead: Exception | None) -> None:
    """Swallow KeyboardInterrupt or replace it by another error, as compiled code does."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    if instead is not None:
        raise instead


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("instead", [ValueError("could not determine the shape of object type"), None])
def test_ctrl_c_ends_with_130_even_if_a_library_swallows_it(instead: Exception | None) -> None:
    app = typer.Typer()

    @app.command()
    @reports_errors
    def load() -> None:
        swallow_ctrl_c(instead)

    done = CliRunner().invoke(app)
    assert done.exit_code == 130
    assert done.stderr == "Interrupted; nothing was left half-written.\n"


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("quiet", [True, False])
def test_the_next_progress_message_raises_after_a_swallowed_ctrl_c(quiet: bool) -> None:
    with progress(quiet) as tell:
        tell("Reading")
        swallow_ctrl_c(None)
        with pytest.raises(KeyboardInterrupt):
            tell("Writing")


@pytest.mark.parametrize("module", ["typer", "rich.console", "cclip_deploy.cli.train", "cclip_deploy.bundle.bundle"])
def test_ctrl_c_during_an_import_ends_with_130_and_one_line(module: str, tmp_path: Path) -> None:
    done = interrupt_import(module, "inspect", tmp_path / "none.cclip")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Interrupted; nothing was left half-written.\n"


def test_ctrl_c_outside_a_command_ends_with_130() -> None:
    """A swallowed Ctrl-C sets the exit code even if the program ends normally, as during the parsing of options."""
    code = """
import signal
from contextlib import suppress
from cclip_deploy.cli.entry import start
def program():
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise SystemExit(0)
start(program)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted; nothing was left half-written.\n")
