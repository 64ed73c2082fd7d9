"""Atomic writes of files and folders, and locks that keep two runs from writing the same target.

A run writes to a hidden path (`.NAME.RANDOM.unfinished`) under a lock of the operating system and renames it at the
end. The lock ends with the process, so an unlocked hidden path was left by a killed run; the next run with the same
target removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from cclip_deploy.common.locks import (
    LOCK,
    clear_leftovers,
    lock_beside,
    locked,
    temporaries,
    temporary_path,
    unfinished_file,
)
from cclip_deploy.errors import CclipError, DataError, EnvironmentIssue, TargetInUse, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PART = re.compile(r"\.(.+)\.([0-9a-f]{16})\.([0-9]+)-of-[0-9]+", re.DOTALL)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
_SYNC_THREADS = 8  # 600 files of 20 kB on ext4 take 0.05 s, with one thread 0.2 to 2 s
_SWAP_TRIES, _SWAP_PAUSE_S = 100, 0.02


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces the folder at `path` if the block succeeds.

    The target is locked for the whole time, and the content is synced to disk before the rename. Missing parents are
    created, and removed again if the block fails. A link at `path` is followed.

    Raises:
        TargetInUse: another run writes this folder.
        EnvironmentIssue: the disk is full or not writable; the folder at `path` is unchanged.
        DataError: another file cannot be read in the block.
    """
    path = path.resolve()
    with scratch_folder(path) as unfinished:
        yield unfinished
        _sync_tree(unfinished)
        _put_in_place(unfinished, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, locked like that of `whole_folder`, and remove it at the end."""
    path = path.resolve()
    unfinished = temporary_path(path)
    with _held(path.parent, lock_beside(path), path):
        try:
            _settle(path)
            yield unfinished
        except OSError as error:
            raise _problem(path, unfinished, error) from error
        finally:
            _settle(path)


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Lock a folder that is filled file by file; create it if missing, and remove it at the end if it is empty.

    Unfinished files of killed runs are removed from it.

    Raises:
        UsageError: `folder` is a file.
        TargetInUse: another run writes into it.
        EnvironmentIssue: it cannot be created or written.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, where a folder is expected. Choose another output.")
    with _held(folder, folder / f".{LOCK}", folder):
        clear_leftovers(folder)
        _settle_sets(folder)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that replaces the one at `path` if the block succeeds.

    Missing parents are created. If two runs write the same file, the last one wins.

    Raises:
        UsageError: `path` is a device or a pipe.
        EnvironmentIssue: the disk is full or not writable; the file at `path` is unchanged.
        DataError: another file cannot be read in the block.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path} is a device or pipe, where a file is expected. Choose another output.")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(path.parent, path.name)
            unfinished = stack.enter_context(unfinished_file(path))
        except OSError as error:
            raise disk_problem(path, error) from error
        try:
            yield unfinished
            _sync(unfinished)
            unfinished.replace(path)
        except OSError as error:
            raise _problem(path, unfinished, error) from error


def replace_together(files: Mapping[Path, bytes]) -> None:
    """Write several files of one folder as one transaction: either all are replaced or none.

    All are written and synced under hidden names before the first rename. After a kill between the renames, the next
    `writing_into` of the folder completes them if the first file was renamed, and discards them otherwise.

    Raises:
        OSError: a file cannot be written; none is replaced unless a rename failed.
    """
    token, count = token_hex(8), len(files)
    for target in files:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    places = enumerate(files, 1)
    parts = {n: (target.with_name(f".{target.name}.{token}.{n}-of-{count}"), target) for n, target in places}
    try:
        for part, target in parts.values():
            part.write_bytes(files[target])
            _sync(part)
        for part, target in parts.values():
            part.replace(target)
    finally:
        _settle_set(parts)


def restore_folder(path: Path) -> None:
    """Restore a folder if the run that was replacing it was killed between its two renames.

    Wait for a run that is between them right now.

    Raises:
        EnvironmentIssue: the folder cannot be restored; the message says what to rename.
    """
    path = Path(os.path.realpath(path))  # unlike `resolve`, accepts a cycle of links
    for _ in range(_SWAP_TRIES):
        found = [] if path.exists() else temporaries(path.parent, path.name, "old")
        if not found:
            return
        try:
            with locked(lock_beside(path), path):
                _settle(path)
        except TargetInUse:
            time.sleep(_SWAP_PAUSE_S)
        except OSError as error:
            raise EnvironmentIssue(
                f"A run was killed while it replaced {path}, and the earlier folder, {found[0].name}, cannot be "
                f"restored ({error}). Rename it to {path.name}."
            ) from error


def disk_problem(path: Path, error: OSError) -> EnvironmentIssue:
    """Return the error for a failed write of `path`."""
    if error.errno in NO_ROOM:
        return EnvironmentIssue(f"The disk is full; {path} is unchanged. Free some space and run the command again.")
    return EnvironmentIssue(f"{path} could not be written ({error}). Choose another path or fix its permissions.")


def reading_problem(path: Path, error: OSError) -> DataError:
    """Return the error for a failed read of `path`."""
    return DataError(f"{path} cannot be read: {error.strerror or error}. Check the path, its permissions and the disk.")


def _problem(path: Path, unfinished: Path, error: OSError) -> CclipError:
    """Return the error of a block that writes `path`: a failed write of it, or a failed read of the file in `error`."""
    named = error.filename
    if isinstance(named, str | os.PathLike) and error.filename2 is None and error.errno not in NO_ROOM:
        other = Path(os.path.abspath(named))
        own = [Path(os.path.abspath(place)) for place in (path, unfinished)]
        if not any(other.is_relative_to(place) or place.is_relative_to(other) for place in own):
            return reading_problem(other, error)
    return disk_problem(path, error)


def sha256_input(path: Path) -> str:
    """Return `sha256_file` of a file given by the user; raise DataError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise reading_problem(path, error) from error


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _held(folder: Path, lock: Path, target: Path) -> Iterator[None]:
    """Create a folder if it is missing and hold a lock."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
            stack.enter_context(locked(lock, target))
        except OSError as error:
            raise disk_problem(target, error) from error
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; at the end, remove those of them that are empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for place in missing:
                place.rmdir()


def _settle(path: Path) -> None:
    """Restore a folder that was moved away but not replaced, and remove other leftovers; the lock must be held."""
    for old in temporaries(path.parent, path.name, "old"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for unfinished in temporaries(path.parent, path.name, "unfinished"):
        if not unfinished.is_file():
            shutil.rmtree(unfinished, ignore_errors=True)


def _settle_sets(folder: Path) -> None:
    sets: defaultdict[str, dict[int, tuple[Path, Path]]] = defaultdict(dict)
    for entry in os.listdir(folder):
        if match := _PART.fullmatch(entry):
            sets[match[2]][int(match[3])] = folder / entry, folder / match[1]
    for parts in sets.values():
        _settle_set(parts)


def _settle_set(parts: Mapping[int, tuple[Path, Path]]) -> None:
    """Complete the renames of a set of files if the first one was renamed; else remove the set, the first file last."""
    if 1 in parts and parts[1][0].exists():
        for _, (part, _) in sorted(parts.items(), reverse=True):
            part.unlink(missing_ok=True)
        return
    for _, (part, target) in sorted(parts.items()):
        if part.exists():
            part.replace(target)


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Replace a folder by two renames; `_settle` restores the old one after a kill between them."""
    if path.exists():
        path.rename(temporary_path(path, "old"))
    unfinished.rename(path)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    """Sync every file and folder to disk, so that none is empty after a power cut following the rename."""
    with ThreadPoolExecutor(_SYNC_THREADS, "cclip-sync") as threads:
        for _ in threads.map(_sync, (folder, *folder.rglob("*"))):
            pass


def _sync(path: Path) -> None:
    if path.is_symlink() or (sys.platform == "win32" and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
