"""Console output of the commands: errors, progress, tables and JSON.

Tables and JSON go to standard output, errors and progress to standard error.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from cclip_deploy.cli.entry import end_interrupted, raise_if_received, received
from cclip_deploy.common.html_page import Section
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import path_problem
from cclip_deploy.errors import CclipError, UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
P = ParamSpec("P")

PIPE_WIDTH = 120
CONTROL_CODES = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
"""Control characters and bidirectional marks, which are removed because they would control the terminal."""
MAX_MESSAGE_LENGTH = 4000
JSON_VERSION = 1
"""Version of all JSON documents of `--json`; increased when a key is removed, renamed or changes its meaning."""
_document_printed = False


class _SafeConsole(Console):
    """Console that prints untrusted text literally: no markup, no escape sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_harmless(text), **options)


_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
stdout = _SafeConsole(markup=False, highlight=False, emoji=False, width=_width)
stderr = _SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


class Verbosity(IntEnum):
    """How much the commands print besides their results and errors."""

    QUIET = -1
    """No progress."""
    NORMAL = 0
    VERBOSE = 1
    """Also a line for each item, such as each image of `predict`."""


_verbosity = Verbosity.NORMAL


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Set the verbosity of this process from the options -q and -v.

    Raises:
        UsageError: both are given.
    """
    global _verbosity
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other. Give one of them.")
    _verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL


def verbosity() -> Verbosity:
    """Return the verbosity of this process."""
    return _verbosity


def _harmless(text: str) -> str:
    return printable(text).translate(CONTROL_CODES)


def styled(text: str, style: str) -> Text:
    """Return text in a style such as "bold red". Only styled text is printed in color."""
    return Text(_harmless(text), style=style)


def reports_errors(command: Command) -> Command:
    """Decorate a command: a CclipError is printed as one message and ends the process with its exit code.

    With the argument `json`, the error is also printed as a JSON document to standard output.

    Ctrl-C ends the process with 130. A signal received during the command ends it even if the KeyboardInterrupt was
    swallowed. Other exceptions are raised.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        start_output()
        try:
            result = command(*args, **kwargs)
            raise_if_received()
        except (Exception, KeyboardInterrupt) as error:
            if received or isinstance(error, KeyboardInterrupt):
                end_interrupted()
            known = path_problem(error) if isinstance(error, OSError) else error
            if not isinstance(known, CclipError):
                raise
            message = str(known)
            if len(message) > MAX_MESSAGE_LENGTH:
                message = f"{message[:MAX_MESSAGE_LENGTH]} …"
            stderr.print(styled("Error:", "bold red"), message, soft_wrap=True)
            if kwargs.get("json"):
                print_json_error(type(known).__name__, message, known.exit_code)
            raise SystemExit(known.exit_code) from known
        return result

    return guarded  # type: ignore[return-value]


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a progress message: a spinner on a terminal, else a line each.

    Nothing is shown if `quiet`, or with the option -q. The function raises KeyboardInterrupt if a signal was received.
    """
    if quiet or _verbosity is Verbosity.QUIET:
        yield _unless_received(lambda message: None)
    elif stderr.is_terminal:
        with stderr.status("Starting") as status:
            yield _unless_received(lambda message: status.update(_one_line(message)))
    else:
        yield _unless_received(lambda message: stderr.print(message, soft_wrap=True))


def _one_line(message: str) -> Text:
    """Return a progress message that is cut at the edge of the terminal, so that the display does not jump."""
    return Text(_harmless(message), no_wrap=True, overflow="ellipsis")


def _unless_received(show: Callable[P, None]) -> Callable[P, None]:
    def report(*args: P.args, **kwargs: P.kwargs) -> None:
        raise_if_received()
        show(*args, **kwargs)

    return report


def report_every(on_progress: Callable[[str], None], what: str, step: int = 100) -> Callable[[int, int], None]:
    """Return a callback that reports every `step`-th item, as in "Mask 200 of 5716"."""

    def report(done: int, total: int) -> None:
        if done % step == 0 or done == total:
            on_progress(f"{what} {done} of {total}")

    return report


@contextmanager
def image_progress(quiet: bool, lines: bool | None = None) -> Iterator[Callable[[Path, int, int], None]]:
    """Yield a function that shows the current image, with the throughput so far and the estimated time left.

    Args:
        quiet: show nothing, as with the option -q.
        lines: whether to print a line for each image; otherwise there is a progress bar, on a terminal only. None
            prints lines where there is no terminal.
    """
    started = time.monotonic()

    def rate(number: int, total: int) -> str:
        seconds, done = time.monotonic() - started, number - 1
        if not done or not seconds:
            return ""
        left = timedelta(seconds=round(seconds / done * (total - done)))
        return f"{done / seconds:.3g} images/s, {left} left"

    def line(path: Path, number: int, total: int) -> None:
        speed = rate(number, total)
        stderr.print(f"{number} of {total}: {path}{speed and f' ({speed})'}", soft_wrap=True)

    lines = not stderr.is_terminal if lines is None else lines
    if quiet or _verbosity is Verbosity.QUIET or not (lines or stderr.is_terminal):
        yield _unless_received(lambda path, number, total: None)
    elif not lines:
        with _image_bar() as bar:
            task = bar.add_task("Starting", total=None, count="")

            def show(path: Path, number: int, total: int) -> None:
                count = f"{number} of {total} {rate(number, total)}".strip()
                bar.update(task, total=total, completed=number - 1, description=_harmless(str(path)), count=count)

            yield _unless_received(show)
    else:
        yield _unless_received(line)


def _image_bar() -> Progress:
    """Return a bar of fixed width, the count, and the path, which is cut at the edge of the terminal."""
    path = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        BarColumn(bar_width=20), TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=path),
        console=stderr, transient=True, expand=True,
    )  # fmt: skip


def start_output() -> None:
    """Note that no JSON document was printed yet; a process may run several commands, as tests do."""
    global _document_printed
    _document_printed = False


def print_json(value: Mapping[str, Any], command: str) -> None:
    """Print the JSON document of a command to standard output; its first key `schema` is name and version."""
    global _document_printed
    _document_printed = True
    others = {key: item for key, item in value.items() if key != "schema"}
    sys.stdout.write(json_text({"schema": f"cclip-deploy/{command}/{JSON_VERSION}", **others}))


def print_json_error(kind: str, message: str, exit_code: int) -> None:
    """Print an error as JSON to standard output, unless the command has already printed its document."""
    if not _document_printed:
        print_json({"error": {"type": kind, "message": message, "exit_code": exit_code}}, "error")


def table(title: str, *columns: str) -> Table:
    """Return an empty table; columns whose name ends in a space are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column.strip(), justify="right" if column.endswith(" ") else "left", overflow="fold")
    return made


def yes_or_no(met: bool | None) -> Text:
    """Return "yes" or "no" in color; empty for None."""
    return styled("", "") if met is None else styled(*(("yes", "green") if met else ("no", "bold red")))


def print_section(section: Section) -> None:
    """Print the table of a section, its title above and its text below."""
    if section.table is not None:
        heads, numbers = enumerate(section.table.head), section.table.numbers
        shown = table(section.title, *(f"{name} " if index in numbers else name for index, name in heads))
        for row in section.table.rows:
            shown.add_row(*(yes_or_no(cell) if isinstance(cell, bool) else styled(cell, "") for cell in row))
        stdout.print(shown)
    for text in section.text:
        stdout.print(text, markup=False)


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return printable(shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
