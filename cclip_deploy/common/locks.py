"""File locks, and hidden names of temporary files and folders.

The operating system releases a lock when its process ends, so a temporary file without a lock was left by a killed
run. Whether locks work between hosts depends on the network file system.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Literal

from cclip_deploy.common.names import printable
from cclip_deploy.errors import EnvironmentIssue, TargetInUse

LOCK = "cclip-lock"
"""Lock file: `.cclip-lock` in a folder that is filled, `.NAME.cclip-lock` beside a folder that is replaced."""

_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_FOLLOW, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(unfinished|old)", re.DOTALL)


@contextmanager
def locked(lock: Path, target: Path) -> Iterator[None]:
    """Hold a lock file, which contains its owner and is removed at the end.

    Raises:
        TargetInUse: another process holds it; the message names `target`.
        EnvironmentIssue: the file system has no locks.
        OSError: the lock file cannot be created.
    """
    descriptor = _take(lock, target)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def lock_beside(path: Path) -> Path:
    """Return the path of the lock of a folder that is replaced as a whole."""
    return path.with_name(f".{path.name}.{LOCK}")


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """Create a locked, empty file beside `path`, to be written and renamed; remove it at the end if it still exists.

    Raises:
        OSError: it cannot be created.
    """
    descriptor, unfinished = _create_locked(path)
    try:
        yield unfinished
    finally:
        with suppress(OSError):
            unfinished.unlink()
        os.close(descriptor)


def temporary_path(path: Path, suffix: Literal["unfinished", "old"] = "unfinished") -> Path:
    """Return a unique hidden path beside `path`."""
    return path.with_name(f".{path.name}.{token_hex(8)}.{suffix}")


def is_bookkeeping(path: Path) -> bool:
    """Return whether a file is a lock or a temporary file of this package."""
    return path.name == f".{LOCK}" or _TEMPORARY.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove unfinished files of killed runs from a folder; only those of `name`, if given."""
    for path in temporaries(folder, name, "unfinished"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | _NO_WAIT | _NO_FOLLOW)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def temporaries(folder: Path, name: str | None, suffix: str) -> list[Path]:
    """Return the temporary files and folders in a folder; only those of `name`, if given."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = ((_TEMPORARY.fullmatch(entry), entry) for entry in names)
    return [
        folder / entry
        for match, entry in found
        if match is not None and match[2] == suffix and name in (None, match[1])
    ]


def _take(lock: Path, target: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
        try:
            taken = _lock(descriptor)
            if taken is None:
                raise EnvironmentIssue(f"The file system of {target} has no file locks. Choose a path on another one.")
            if not taken:
                raise TargetInUse(_in_use_message(descriptor, target))
            if _is_file_at(lock, descriptor):  # otherwise its owner has just removed it
                started = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on host {platform.node()}, since {started}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _in_use_message(descriptor: int, target: Path) -> str:
    content = os.read(descriptor, 200).decode(errors="replace")
    owner = "".join(letter for letter in content if letter.isprintable()) or "which has just started"
    return (
        f"{printable(target)} is being written by another run ({owner}). Wait until it ends or choose another path. "
        "Nothing was changed."
    )


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _create_locked(path: Path) -> tuple[int, Path]:
    while True:
        unfinished = temporary_path(path)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor)
        if _is_file_at(unfinished, descriptor):  # otherwise another run removed it before it was locked
            return descriptor, unfinished
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Try to lock an open file; return whether it is locked now, None if the file system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True
