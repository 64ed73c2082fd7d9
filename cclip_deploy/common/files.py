"""Folders and files that appear whole or not at all, and locks that keep two runs out of one place.

A run writes under a hidden name of its own (`.NAME.RANDOM.unfinished`) and renames at the end. It holds a lock of the
operating system meanwhile, which the kernel releases when the process ends, however it ends: what lies there without
a lock is left over from a run that was killed, and the next run with the same target removes it.
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
_SYNC_THREADS = 8  # 600 files of 20 kB on ext4: 0.05 s; one after the other 0.2 to 2 s
_SWAP_TRIES, _SWAP_PAUSE_S = 100, 0.02


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes that name, in place of what was there, only when the block ends well.

    The lock is held from before the block to after the renames, and everything is on the disk before them. Parents
    that are missing are made, and removed again where the block fails. A link at `path` stays one.

    Raises:
        TargetInUse: another run writes this folder.
        EnvironmentIssue: the disk is full or cannot be written; what was at `path` is still there.
        DataError: another file cannot be read in the block.
    """
    path = Path(os.path.realpath(path))
    with scratch_folder(path) as unfinished:
        yield unfinished
        _sync_tree(unfinished)
        _put_in_place(unfinished, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """As `whole_folder`, but never put in place: a folder to work in, on the disk of `path`."""
    path = Path(os.path.realpath(path))
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
    """Hold a folder that a run fills file by file; it is made if it is missing, and removed if it stays empty.

    Files that killed runs left unfinished in it are removed.

    Raises:
        UsageError: it is a file.
        TargetInUse: another run writes into it.
        EnvironmentIssue: it cannot be made or written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, where a folder is expected. Choose another output.")
    with _held(folder, folder / f".{LOCK}", folder):
        clear_leftovers(folder)
        _settle_sets(folder)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file at; it takes that name, in place of what was there, if the block ends well.

    Parents that are missing are made. Of two runs that write one file at once, the last to end wins.

    Raises:
        UsageError: a device or pipe is at `path`: it would be replaced.
        EnvironmentIssue: the disk is full or cannot be written; what was at `path` is still there.
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
    """Write files of one folder so that a run that is killed leaves all the old ones or, settled, all the new ones.

    All are on the disk under hidden names before the first takes its own. A kill between the renames is made good by
    `writing_into`, which the next run into the folder calls: where the first file has its name, the others get theirs.

    Raises:
        OSError: a file cannot be written; none is replaced, unless it was a rename that failed.
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
    """Put a folder back where the run that was replacing it was killed between its two renames.

    A run that is between them just now is waited for.

    Raises:
        EnvironmentIssue: the folder cannot be put back; the message says what to rename.
    """
    path = Path(os.path.realpath(path))
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
                f"A run was killed while it replaced {path}, and {found[0].name} beside it cannot be put back "
                f"({error}). Rename that to {path.name}."
            ) from error


def disk_problem(path: Path, error: OSError) -> EnvironmentIssue:
    """The error of a disk that did not take `path`."""
    if error.errno in NO_ROOM:
        return EnvironmentIssue(f"The disk is full; {path} was left as it was. Free some space and run it again.")
    return EnvironmentIssue(f"{path} could not be written ({error}). Choose another place, or mend this one.")


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


@contextmanager
def _held(folder: Path, lock: Path, target: Path) -> Iterator[None]:
    """A folder that is there, made if need be, and a lock that is held."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
            stack.enter_context(locked(lock, target))
        except OSError as error:
            raise disk_problem(target, error) from error
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder and its parents are there within the block; those that were missing go again if they stay empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for place in missing:
                place.rmdir()


def _settle(path: Path) -> None:
    """Under the lock: put back what was moved away and not replaced, and remove all else that a run left."""
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
    """Rename what is left of a set whose first file has been renamed; remove that of any other, the first last."""
    if 1 in parts and parts[1][0].exists():
        for _, (part, _) in sorted(parts.items(), reverse=True):
            part.unlink(missing_ok=True)
        return
    for _, (part, target) in sorted(parts.items()):
        if part.exists():
            part.replace(target)


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Killed between the two renames, `_settle` puts the old folder back."""
    if path.exists():
        path.rename(temporary_path(path, "old"))
    unfinished.rename(path)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    """Have every file and folder on the disk, so that a power cut after the rename leaves none of them empty."""
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
