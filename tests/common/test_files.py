"""Tests of atomic writes and of the errors of files that cannot be read or written."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.common.files import sha256_file, sha256_input, whole_file, whole_folder
from cclip_deploy.errors import DataError, EnvironmentIssue

WHOLE: list[Any] = [whole_folder, whole_file]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EISDIR])
def test_a_failed_read_of_another_file_is_a_data_error(
    whole: type[AbstractContextManager[Path]], number: int, tmp_path: Path
) -> None:
    other = tmp_path / "image.png"
    with pytest.raises(DataError, match=r"image\.png cannot be read: .*permissions"), whole(tmp_path / "new"):
        raise OSError(number, os.strerror(number), str(other))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", WHOLE)
def test_errors_of_the_target_or_without_a_file_name_are_write_errors(
    whole: type[AbstractContextManager[Path]], tmp_path: Path
) -> None:
    for filename in (None, "{unfinished}", "{unfinished}/deep/file", "{parent}"):
        with pytest.raises(EnvironmentIssue, match="new could not be written"), whole(tmp_path / "new") as unfinished:
            refuse(filename and filename.format(unfinished=unfinished, parent=tmp_path))


def refuse(filename: str | None) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", filename)


@pytest.mark.parametrize("whole", WHOLE)
def test_a_full_disk_is_reported_for_any_file(whole: type[AbstractContextManager[Path]], tmp_path: Path) -> None:
    with pytest.raises(EnvironmentIssue, match="The disk is full"), whole(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere")


def test_sha256_input_of_an_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, B.1
    assert sha256_input(tmp_path / "a") == sha256_file(tmp_path / "a")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        sha256_input(tmp_path)
