"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cclip_deploy.errors import EnvironmentProblem


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes that name, in place of what was there, only when the block ends well.

    Parents that are missing are made, and taken away again where the block fails. A link at `path` stays one.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written; what was at `path` is still there.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    missing_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        _put_in_place(unfinished, path)
    except OSError as error:
        raise disk_problem(path, error) from error
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
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise disk_problem(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def disk_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """What to tell a user whose disk did not take `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentProblem(f"The disk is full; {path} was left as it was. Free some space and run it again.")
    return EnvironmentProblem(f"{path} could not be written ({error}). Choose another place, or mend this one.")


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
