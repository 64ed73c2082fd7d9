"""What the commands share: errors to exit codes, progress to standard error, tables and JSON to standard output."""

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
from cclip_deploy.common.files import whole_file
from cclip_deploy.common.names import json_text, printable
from cclip_deploy.common.paths import path_problem
from cclip_deploy.errors import CclipError

Command = TypeVar("Command", bound=Callable[..., Any])
P = ParamSpec("P")

PIPE_WIDTH = 120
CONTROL_CODES = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
"""What would steer a terminal: escape sequences, and marks that turn the direction of writing."""
LONGEST_MESSAGE = 4000


class _SafeConsole(Console):
    """Prints text as it is: no markup, no escape sequences; file names, prompts and manifests are strangers' text."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_harmless(text), **options)


stdout = _SafeConsole(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = _SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


def _harmless(text: str) -> str:
    return printable(text).translate(CONTROL_CODES)


def styled(text: str, style: str) -> Text:
    """A text in a style, such as "bold red"; the only way to print in colors."""
    return Text(_harmless(text), style=style)


def reports_errors(command: Command) -> Command:
    """Turn an error on purpose into one message and its exit code; Ctrl-C into 130. Bugs keep their traceback.

    A signal that came during the command ends it with 130 (143), even where its KeyboardInterrupt was swallowed.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            result = command(*args, **kwargs)
            raise_if_received()
        except (Exception, KeyboardInterrupt) as error:
            if received or isinstance(error, KeyboardInterrupt):
                end_interrupted()
            told = path_problem(error) if isinstance(error, OSError) else error
            if not isinstance(told, CclipError):
                raise
            message = str(told) if len(str(told)) <= LONGEST_MESSAGE else f"{str(told)[:LONGEST_MESSAGE]} …"
            stderr.print(styled("Error:", "bold red"), message, soft_wrap=True)
            raise SystemExit(told.exit_code) from told
        return result

    return guarded  # type: ignore[return-value]


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: a spinner on a terminal, lines elsewhere, nothing where quiet.

    It raises KeyboardInterrupt if a signal came before.
    """
    if quiet:
        yield _unless_received(lambda message: None)
    elif stderr.is_terminal:
        with stderr.status("Starting") as status:
            yield _unless_received(lambda message: status.update(styled(message, "")))
    else:
        yield _unless_received(lambda message: stderr.print(message, soft_wrap=True))


def _unless_received(show: Callable[P, None]) -> Callable[P, None]:
    def tell(*args: P.args, **kwargs: P.kwargs) -> None:
        raise_if_received()
        show(*args, **kwargs)

    return tell


def tell_every(tell: Callable[[str], None], what: str, step: int = 100) -> Callable[[int, int], None]:
    """A callback that shows "Mask 200 of 5716" now and then: long work is told, not every piece of it."""

    def told(done: int, total: int) -> None:
        if done % step == 0 or done == total:
            tell(f"{what} {done} of {total}")

    return told


@contextmanager
def picture_progress(quiet: bool) -> Iterator[Callable[[Path, int, int], None]]:
    """A function that is told each picture as its turn comes: a bar on a terminal, a line elsewhere, or nothing.

    Both show pictures a second, of those that are done, and the time that is left at that rate.
    """
    started = time.monotonic()

    def line(path: Path, number: int, total: int) -> str:
        seconds, done = time.monotonic() - started, number - 1
        if not done or not seconds:
            return f"{number} of {total}: {path}"
        left = timedelta(seconds=round(seconds / done * (total - done)))
        return f"{number} of {total}: {path} ({done / seconds:.3g} pictures/s, {left} left)"

    if quiet:
        yield _unless_received(lambda path, number, total: None)
    elif stderr.is_terminal:
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
    """One JSON document on standard output, and nothing else."""
    sys.stdout.write(json_text(value))


def write_json(path: Path, value: Any) -> None:
    """One JSON document in a file, whole or not at all; EnvironmentIssue where it cannot be written."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(value), encoding="utf-8")


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name ends in a space are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column.strip(), justify="right" if column.endswith(" ") else "left", overflow="fold")
    return made


def yes_or_no(met: bool | None) -> Text:
    """Whether a goal is met, in color; empty where there is none."""
    return styled("", "") if met is None else styled(*(("yes", "green") if met else ("no", "bold red")))


def si(count: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 21.4 G, 85.3 M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".strip()


def command_line() -> str:
    """The command as it was typed, for manifests and reports."""
    return printable(shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
