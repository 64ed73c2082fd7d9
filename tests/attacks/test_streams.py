"""If stdout is closed, full or lacks a character, a command prints at most one line and exits with the right code.

Before: a reader that went away gave exit code 1 or 120 and a traceback (`BrokenPipeError`, from Rich or at the
interpreter's end), /dev/full a traceback of OSError, a closed descriptor one of AttributeError, and a character that
the encoding lacks one of UnicodeEncodeError.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cclip_deploy.cli.app import main
from cclip_deploy.cli.commands import app
from tests.attacks.test_kills import in_child

COMMANDS = sorted(str(command.name) for command in app.registered_commands)
LOST = "Error: Standard output could not be written ("


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def nothing() -> int:
    """The descriptor is closed, as by `>&-`."""
    return -1


def run(arguments: list[str], output: int, encoding: str = "utf-8") -> tuple[int, str]:
    """Exit code and standard error of the command line in a forked child, whose standard output is a descriptor."""
    with tempfile.TemporaryFile("w+") as errors:

        def program() -> None:
            os.dup2(errors.fileno(), 2)
            os.close(1) if output < 0 else os.dup2(output, 1)
            plain = None if output < 0 else io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding)  # type: ignore[type-var]
            sys.stdout = sys.__stdout__ = plain  # type: ignore[assignment,misc]
            sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w"), encoding)  # type: ignore[misc,type-var]
            sys.argv = ["cclip-deploy", *arguments]
            os._exit(end_of(main))

        code = in_child(program)
        if output >= 0:
            os.close(output)
        errors.seek(0)
        return code, errors.read()


def end_of(program: Callable[[], None]) -> int:
    """The exit code that the interpreter ends with: 120 where its last flush fails, 1 where an error comes out."""
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}".encode())
        code = 1
    try:
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None:
                stream.flush()
    except BaseException:
        return 120
    return code


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_went_away_ends_every_command_quietly(name: str) -> None:
    assert run([name, "--help"], closed_pipe()) == (141, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_under_standard_output_is_said_by_every_command(name: str) -> None:
    code, said = run([name, "--help"], full_disk())
    assert code == 3
    assert said.startswith(LOST + "No space left on device)")
    assert said.count("\n") == 1


RESULTS = [
    ["inspect", "BUNDLE"], ["inspect", "BUNDLE", "--json"], ["prompt", "left lung", "--bundle", "BUNDLE"],
    ["data", "FILMS", "--bundle", "BUNDLE", "--json"], ["synth", "NEW", "--images", "5", "--size", "32"],
    ["synth", "NEW", "--images", "5", "--size", "32", "--json"], ["--version"], ["--help"],
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from cclip_deploy.datasets.synthetic.generator import write_dataset

    folder = tmp_path_factory.mktemp("streams")
    write_dataset(folder / "films", {"test": 2}, (32, 32), 0)
    return {"BUNDLE": str(tiny_bundle_path), "FILMS": str(folder / "films")}


@pytest.mark.parametrize("arguments", RESULTS, ids=" ".join)
def test_results_that_nobody_gets_are_never_called_given(
    arguments: list[str], places: dict[str, str], tmp_path: Path
) -> None:
    """In tables and as JSON; where the work itself is on the disk, as synth's, it is whole."""
    for number, (output, code) in enumerate(((closed_pipe, 141), (full_disk, 3), (nothing, 3))):
        there = {**places, "NEW": str(tmp_path / f"new{number}")}
        found, said = run([there.get(word, word) for word in arguments], output())
        assert found == code, said
        assert "Traceback" not in said
        assert (LOST in said) == (code == 3)
        if "NEW" in arguments:
            assert len(list((tmp_path / f"new{number}" / "images").iterdir())) == 5


def test_a_closed_output_does_not_write_into_the_next_file(places: dict[str, str], tmp_path: Path) -> None:
    """The next file that is opened would get descriptor 1."""
    code, _ = run(["synth", str(tmp_path / "new"), "--images", "5", "--size", "32", "--json"], nothing())
    assert code == 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b'"folder"' in path.read_bytes()]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_characters_that_the_encoding_lacks_are_written_as_codes(
    encoding: str, form: list[str], places: dict[str, str], tmp_path: Path
) -> None:
    text = "left lung 🫁 ≥ 3 × Größe"
    with (tmp_path / "out").open("wb") as file:
        code, said = run(
            ["prompt", text, "--bundle", places["BUNDLE"], "--no-repair", *form], os.dup(file.fileno()), encoding
        )
    assert (code, said) == (0, "")
    written = (tmp_path / "out").read_bytes().decode(encoding)
    assert ("\\ud83e\\udec1" if form else "\\U0001fac1") in written


def test_messages_that_nobody_gets_change_nothing(places: dict[str, str], tmp_path: Path) -> None:
    """Progress goes to standard error; a run is not given up because its log is full."""

    def program() -> None:
        os.dup2(full_disk(), 2)
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w"))  # type: ignore[misc,type-var]
        sys.argv = ["cclip-deploy", "synth", str(tmp_path / "new"), "--images", "5", "--size", "32"]
        os._exit(end_of(main))

    assert in_child(program) == 0
    assert len(list((tmp_path / "new" / "images").iterdir())) == 5
