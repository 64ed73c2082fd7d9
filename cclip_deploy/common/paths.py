"""Checks of paths given by users: inputs before they are opened, outputs before any work is done."""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from pathlib import Path, PureWindowsPath

from cclip_deploy.common.files import disk_problem
from cclip_deploy.errors import CclipError, DataError

BAD_PATHS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR})
_SHOWN_LETTERS = 300
_SMALL_READ = 2**16


def shown(path: Path | str) -> str:
    """Return a path for a message; a long one is shortened in the middle."""
    text = str(path)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:200]}…{text[-50:]}"


def check_regular_file(path: Path, what: str, error: type[CclipError] = DataError, most_bytes: int = 2**63) -> None:
    """Raise `error` unless `path` is a regular file that is readable, not empty and not too large.

    Args:
        path: file given by the user.
        what: what the file should be, such as "image", for the message.
        error: class to raise.
        most_bytes: maximum size.
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
            f"{path} has {status.st_size:,} bytes; the maximum for a {what} is {most_bytes:,}. Split or reduce it."
        )


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False if the operating system rejects the path."""
    try:
        return path.is_file()
    except OSError:
        return False


class BoundedFile(io.BufferedReader):
    """A file for reading; a read allocates at most as many bytes as are left in the file.

    Python allocates the requested number of bytes, and decoders request lengths that an untrusted file contains.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes; by default all that are left."""
        if size is not None and 0 <= size <= _SMALL_READ:
            return super().read(size)
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_text(path: Path, what: str, most_bytes: int, error: type[CclipError] = DataError) -> str:
    """Return the text of a regular file in UTF-8, without a byte-order mark; raise `error` if it cannot be read."""
    check_regular_file(path, what, error, most_bytes)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read as UTF-8: {_reason(problem)}. Save it again in UTF-8.") from problem


def check_inside(folder: Path, name: str, where: str, allow_outside: bool = False) -> Path:
    """Return the file that a table of a data set names.

    Backslashes separate folders, as in tables made on Windows, unless a file has that very name.

    Raises:
        DataError: the name is an absolute path or contains `..`, and `allow_outside` is False.
    """
    windows = PureWindowsPath(name) if "\\" in name and not is_file(folder / name) else None
    path = Path(name) if windows is None else Path(windows.as_posix())
    on_drive = windows is not None and windows.drive != ""
    if not allow_outside and (on_drive or path.is_absolute() or ".." in path.parts):
        raise DataError(
            f"{where}: {shown(name)} is outside the data set's folder {folder}. Name files inside it, or give "
            "--allow-outside (data.allow_outside in a recipe) if you trust this table."
        )
    return folder / path


def check_writable(*paths: Path | None) -> None:
    """Raise EnvironmentIssue if an output cannot be written; None is skipped."""
    for path in filter(None, paths):
        try:
            absolute = Path(os.path.abspath(path))
            place = next(parent for parent in (absolute, *absolute.parents) if _exists(parent))
            if place == absolute and not place.is_dir():
                place = place.parent
            with tempfile.TemporaryFile(dir=place):
                pass
        except (OSError, ValueError) as problem:
            reason = OSError(getattr(problem, "errno", errno.EINVAL), _reason(problem))
            raise disk_problem(Path(shown(path)), reason) from problem


def path_problem(problem: OSError) -> DataError | None:
    """Return the DataError for a path that the operating system rejects, such as one too long; else None."""
    if problem.errno not in BAD_PATHS or not isinstance(problem.filename, str | bytes | os.PathLike):
        return None
    return DataError(f"{shown(os.fsdecode(problem.filename))}: {problem.strerror}. Check the path and its permissions.")


def _exists(path: Path) -> bool:
    """Return whether a path exists; unlike `Path.exists`, raise OSError for a cycle of links."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _reason(problem: Exception) -> str:
    return problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem)
