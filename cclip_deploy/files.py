"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cclip_deploy.errors import CclipError, DataError, EnvironmentProblem

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes that name, in place of what was there, only when the block ends well.

    Parents that are missing are made, and taken away again where the block fails. A link at `path` stays one.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written; what was at `path` is still there.
        DataError: another file cannot be read in the block.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    missing_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        _put_in_place(unfinished, path)
    except OSError as error:
        raise _problem(path, unfinished, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            for parent in missing_parents:
                parent.rmdir()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file at; it takes that name, in place of what was there, if the block ends well.

    Parents that are missing are made.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written; what was at `path` is still there.
        DataError: another file cannot be read in the block.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise _problem(path, unfinished, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def disk_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """The error of a disk that did not take `path`."""
    if error.errno in NO_ROOM:
        return EnvironmentProblem(f"The disk is full; {path} was left as it was. Free some space and run it again.")
    return EnvironmentProblem(f"{path} could not be written ({error}). Choose another place, or mend this one.")


def reading_problem(path: Path, error: OSError) -> DataError:
    """The error of a file that is there but cannot be read, or is gone."""
    return DataError(f"{path} cannot be read: {error.strerror or error}. Check the path, its permissions and the disk.")


def _problem(path: Path, unfinished: Path, error: OSError) -> CclipError:
    """What failed while `path` was filled: writing it, or reading the other file that the error names."""
    named = error.filename
    if isinstance(named, str | os.PathLike) and error.filename2 is None and error.errno not in NO_ROOM:
        other = Path(os.path.abspath(named))
        own = [Path(os.path.abspath(place)) for place in (path, unfinished)]
        if not any(other.is_relative_to(place) or place.is_relative_to(other) for place in own):
            return reading_problem(other, error)
    return disk_problem(path, error)


def sha256_input(path: Path) -> str:
    """As `sha256_file`, of a file that a user named; DataError where it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise reading_problem(path, error) from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link a file where the file system can, else copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put_in_place(unfinished: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        unfinished.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
