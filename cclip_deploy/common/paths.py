"""Paths that users name: inputs are checked before they are opened, and outputs before any work is done."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from cclip_deploy.common.files import disk_problem
from cclip_deploy.common.limits import LARGEST_JSON, MOST_JSON_VALUES
from cclip_deploy.errors import CclipError, DataError

BAD_PATHS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR})
_SHOWN_LETTERS = 300
_SMALL_READ = 2**16


def shown(path: Path | str) -> str:
    """A path for a message; of a long one its beginning and its end."""
    text = str(path)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:200]}…{text[-50:]}"


def check_regular_file(path: Path, what: str, error: type[CclipError] = DataError, most_bytes: int = 2**63) -> None:
    """Raise `error` unless `path` is a file that can be read to its end: not missing, a pipe, a device, empty or huge.

    Args:
        path: what the user named.
        what: is expected, such as "picture".
        error: the class to raise.
        most_bytes: the largest size that is read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise error(f"{shown(path)} does not exist. Check the path.") from None
    except (OSError, ValueError) as problem:
        raise error(f"{shown(path)} cannot be read: {_reason(problem)}. Check the path and its permissions.") from None
    if stat.S_ISDIR(status.st_mode):
        raise error(f"{path} is a folder, where a {what} was expected. Name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is a pipe, socket or device, not a regular file. Save the {what} to a file first.")
    if status.st_size == 0:
        raise error(f"{path} is empty (0 bytes). Copy or export it again.")
    if status.st_size > most_bytes:
        raise error(
            f"{path} has {status.st_size:,} bytes; a {what} of up to {most_bytes:,} is read. Split or reduce it."
        )


def is_file(path: Path) -> bool:
    """Whether there is a file, of any kind but a folder; False where the path cannot be one."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether there is anything at a path; True, too, where the system refuses the path, so that its use says why."""
    try:
        return path.exists()
    except OSError:
        return True


class BoundedFile(io.BufferedReader):
    """A file to read, which never takes more memory for a read than it has bytes left.

    Python sets aside as much as is asked, and decoders ask for the lengths that a stranger's file says.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes; all that are left unless given."""
        if size is not None and 0 <= size <= _SMALL_READ:
            return super().read(size)
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_text(path: Path, what: str, most_bytes: int, error: type[CclipError] = DataError) -> str:
    """The text of a regular file in UTF-8; a byte-order mark is passed over. Raises `error`."""
    check_regular_file(path, what, error, most_bytes)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read as UTF-8: {_reason(problem)}. Save it again in UTF-8.") from problem


def read_json(path: Path) -> Any:
    """The JSON document in a file.

    Raises:
        DataError: the file is no regular one, too large, no JSON, or nested too deeply.
    """
    return parse_json(read_text(path, "JSON file", LARGEST_JSON), str(path))


def parse_json(text: str, where: str, **options: Any) -> Any:
    """As `json.loads` with its options; DataError that names `where` if it is no JSON or holds too many values."""
    if sum(text.count(mark) for mark in "[{,") > MOST_JSON_VALUES:
        raise DataError(f"{where} holds more than {MOST_JSON_VALUES:,} JSON values. Split it.")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise DataError(f"{where} cannot be read as JSON: it is nested too deeply. Restore or correct it.") from None
    except ValueError as problem:
        raise DataError(f"{where} cannot be read as JSON: {problem}. Restore or correct it.") from problem


def check_inside(folder: Path, name: str, where: str, allow_outside: bool = False) -> Path:
    """The file that a data set's table names, below `folder`; DataError where an absolute or `..` path leaves it."""
    if not allow_outside and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise DataError(
            f"{where}: {shown(name)} leaves the data set's folder {folder}. Name files below it, or give "
            "--allow-outside (data.allow_outside in a recipe) if you trust this table."
        )
    return folder / name


def check_writable(*paths: Path | None) -> None:
    """EnvironmentIssue where an output cannot be written, before any work for it is done; None is passed over."""
    for path in filter(None, paths):
        try:
            absolute = Path(os.path.abspath(path))
            place = next(there for there in (absolute, *absolute.parents) if _is_found(there))
            if place == absolute and not place.is_dir():
                place = place.parent
            with tempfile.TemporaryFile(dir=place):
                pass
        except (OSError, ValueError) as problem:
            reason = OSError(getattr(problem, "errno", errno.EINVAL), _reason(problem))
            raise disk_problem(Path(shown(path)), reason) from problem


def path_problem(problem: OSError) -> DataError | None:
    """The error for a path that the system refuses, such as one of 5,000 letters; None for other failures."""
    if problem.errno not in BAD_PATHS or not isinstance(problem.filename, str | bytes | os.PathLike):
        return None
    return DataError(f"{shown(os.fsdecode(problem.filename))}: {problem.strerror}. Check the path and its permissions.")


def _is_found(path: Path) -> bool:
    """Whether there is anything; unlike `Path.exists` this raises where links go in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _reason(problem: Exception) -> str:
    return problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem)
