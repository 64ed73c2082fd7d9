"""Locks of files and folders, and the hidden names under which a run writes what is not complete.

A lock is the operating system's and ends with its process, however that ends: what lies under a hidden name and is
not locked was left by a run that was killed. On a network file system, locks hold between hosts where it says so.
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
"""Of a folder that stays where it is, `.cclip-lock` in it; of one that is replaced, `.NAME.cclip-lock` beside it."""

_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_FOLLOW, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(unfinished|old)", re.DOTALL)


@contextmanager
def locked(lock: Path, target: Path) -> Iterator[None]:
    """Hold a lock file, which says who holds it and is removed at the end.

    Raises:
        TargetInUse: another run holds it; the message says that it is writing `target`.
        EnvironmentIssue: the file system has no locks.
        OSError: the lock file cannot be made.
    """
    descriptor = _take(lock, target)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def lock_beside(path: Path) -> Path:
    """The lock of a folder that is replaced as a whole."""
    return path.with_name(f".{path.name}.{LOCK}")


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, locked, to write and rename; removed at the end if it is still there.

    Raises:
        OSError: it cannot be made.
    """
    descriptor, unfinished = _create_locked(path)
    try:
        yield unfinished
    finally:
        with suppress(OSError):
            unfinished.unlink()
        os.close(descriptor)


def temporary_path(path: Path, suffix: Literal["unfinished", "old"] = "unfinished") -> Path:
    """A hidden name beside `path` that no other process has, in whatever container it runs."""
    return path.with_name(f".{path.name}.{token_hex(8)}.{suffix}")


def is_bookkeeping(path: Path) -> bool:
    """Whether a file is a lock or a temporary of ours, so no content of its folder."""
    return path.name == f".{LOCK}" or _TEMPORARY.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the files that killed runs left unfinished in a folder; those of `name` alone, if given."""
    for path in temporaries(folder, name, "unfinished"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | _NO_WAIT | _NO_FOLLOW)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def temporaries(folder: Path, name: str | None, suffix: str) -> list[Path]:
    """Temporary files and folders in a folder; those of `name` alone, if given."""
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
                raise EnvironmentIssue(f"The disk that holds {target} has no file locks. Choose a place on another.")
            if not taken:
                raise TargetInUse(_who_holds(descriptor, target))
            if _is_file_at(lock, descriptor):  # else its holder has just removed it
                started = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on host {platform.node()}, since {started}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _who_holds(descriptor: int, target: Path) -> str:
    said = os.read(descriptor, 200).decode(errors="replace")
    holder = "".join(letter for letter in said if letter.isprintable()) or "which has just begun"
    return (
        f"{printable(target)} is being written by another run ({holder}). Wait until that has ended, or choose another "
        "place. Nothing was done."
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
        if _is_file_at(unfinished, descriptor):  # else another run took it for a leftover before it was locked
            return descriptor, unfinished
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of an open file: whether that succeeded, None where the file system has no locks."""
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
