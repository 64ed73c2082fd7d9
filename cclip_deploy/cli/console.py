"""Console output of the commands: errors, progress, tables and JSON.

Tables and JSON go to standard output, errors and progress to standard error.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cclip_deploy.cli.entry import end_interrupted, raise_if_received, received
from cclip_deploy.common.html_page import Section
from cclip_deploy.common.json_file import json_text
from cclip_deploy.common.names import printable
from cclip_deploy.common.paths import path_problem
from cclip_deploy.errors import CclipError

Command = TypeVar("Command", bound=Callable[..., Any])
P = ParamSpec("P")

PIPE_WIDTH = 120
CONTROL_CODES = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
"""Control characters and bidirectional marks, which are removed because they would control the terminal."""
MAX_MESSAGE_LENGTH = 4000


class _SafeConsole(Console):
    """Console that prints untrusted text literally: no markup, no escape sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_harmless(text), **options)


stdout = _SafeConsole(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = _SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


def _harmless(text: str) -> str:
    return printable(text).translate(CONTROL_CODES)


def styled(text: str, style: str) -> Text:
    """Return text in a style such as "bold red". Only styled text is printed in color."""
    return Text(_harmless(text), style=style)


def reports_errors(command: Command) -> Command:
    """Decorate a command: a CclipError is printed as one message and ends the process with its exit code.

    Ctrl-C ends the process with 130. A signal received during the command ends it even if the KeyboardInterrupt was
    swallowed. Other exceptions are raised.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
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
            raise SystemExit(known.exit_code) from known
        return result

    return guarded  # type: ignore[return-value]


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a progress message: a spinner on a terminal, else a line each; nothing if quiet.

    The function raises KeyboardInterrupt if a signal was received.
    """
    if quiet:
        yield _unless_received(lambda message: None)
    elif stderr.is_terminal:
        with stderr.status("Starting") as status:
            yield _unless_received(lambda message: status.update(styled(message, "")))
    else:
        yield _unless_received(lambda message: stderr.print(message, soft_wrap=True))


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
        quiet: show nothing.
        lines: whether to print a line for each image; otherwise there is a progress bar, on a terminal only. None
            prints lines where there is no terminal.
    """
    started = time.monotonic()

    def line(path: Path, number: int, total: int) -> str:
        seconds, done = time.monotonic() - started, number - 1
        if not done or not seconds:
            return f"{number} of {total}: {path}"
        left = timedelta(seconds=round(seconds / done * (total - done)))
        return f"{number} of {total}: {path} ({done / seconds:.3g} images/s, {left} left)"

    lines = not stderr.is_terminal if lines is None else lines
    if quiet or not (lines or stderr.is_terminal):
        yield _unless_received(lambda path, number, total: None)
    elif not lines:
        with Progress(
            BarColumn(), TextColumn("{task.description}", markup=False), console=stderr, transient=True
        ) as bar:
            task = bar.add_task("Starting", total=None)

            def show(path: Path, number: int, total: int) -> None:
                description = _harmless(line(path, number, total))
                bar.update(task, total=total, completed=number - 1, description=description)

            yield _unless_received(show)
    else:
        yield _unless_received(lambda path, number, total: stderr.print(line(path, number, total), soft_wrap=True))


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json_text(value))


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
