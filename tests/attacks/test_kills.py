"""A run killed at any file operation leaves the old or the new output, and the next run removes temporary files.

Before: `.unfinished`, `.part` and `.old` stayed for ever after kill -9 or SIGHUP; between the two renames of a
replaced folder there was no bundle at all; and a kill among the three renames of a mask left its overlay of another
run. tests/attacks/long/kill.py does the same to whole commands.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cclip_deploy.cli.entry import start
from cclip_deploy.common.files import replace_together, restore_folder, whole_file, whole_folder, writing_into
from tests.attacks.memory import prepare_child
from tests.bundles import digests
from tests.cli.run import interrupt_at

KILLED, SURVIVED, FAILED = 9, 0, 1
EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.truncate", "fcntl.flock"}
)


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a forked child that does the work and ends without any clean-up of the parent's."""
    child = os.fork()
    if child == 0:
        prepare_child()
        try:
            work()
        except BaseException:
            os._exit(FAILED)
        os._exit(SURVIVED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(work: Callable[[], object], moment: int) -> int:
    """As `in_child`, ended before the file operation of that number as kill -9 ends it: nothing more is run."""

    def dying() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in EVENTS:
                seen += 1
                if seen == moment:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        work()

    return in_child(dying)


def every_kill(work: Callable[[], object], prepare: Callable[[], object], check: Callable[[], object]) -> int:
    """Kill the work at each of its file operations, each on a fresh start; how many there were."""
    for moment in range(1, 1000):
        prepare()
        code = killed_at(work, moment)
        check()
        if code == SURVIVED:
            return moment - 1
        assert code == KILLED, f"the run failed by itself at operation {moment}"
    raise AssertionError("The work never ended.")


@pytest.mark.parametrize("there_before", [True, False])
def test_a_folder_is_the_old_one_or_the_new_one(there_before: bool, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "set"

    def fill(text: str) -> None:
        with whole_folder(target) as unfinished:
            (unfinished / "part").mkdir(parents=True)
            for name in ("a", "part/b"):
                (unfinished / name).write_text(text)

    def prepare() -> None:
        fill("old" if there_before else "none")
        if not there_before:
            for path in sorted(target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.rmdir()

    def check() -> None:
        restore_folder(target)  # what every reader does
        found = {path.read_text() for path in target.rglob("*") if path.is_file()}
        seen.append("".join(found))
        assert len(list(target.rglob("*"))) == (3 if found else 0)
        assert found in ([{"old"}, {"new"}] if there_before else [set(), {"new"}])
        fill("new")
        assert digests(tmp_path).keys() == {"deep/set/a", "deep/set/part/b"}

    seen: list[str] = []
    assert every_kill(lambda: fill("new"), prepare, check) > 15
    assert set(seen) == ({"old", "new"} if there_before else {"", "new"})


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "run.json"

    def write(text: str) -> None:
        with whole_file(target) as unfinished:
            unfinished.write_text(text)

    def check() -> None:
        assert target.read_text() in ("old", "new")
        write("next")
        assert os.listdir(tmp_path) == ["run.json"]

    assert every_kill(lambda: write("new"), lambda: write("old"), check) >= 5


def test_files_of_one_answer_are_never_of_two_runs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    names = [f"a-{what}.png" for what in ("mask", "probability", "overlay")]

    def write(text: str) -> None:
        with writing_into(folder):
            replace_together({folder / name: text.encode() for name in names})

    def check() -> None:
        with writing_into(folder):
            found = {(folder / name).read_text() for name in names}
            assert found in ({"old"}, {"new"})
            seen.update(found)
        assert sorted(os.listdir(folder)) == sorted(names)

    seen: set[str] = set()
    assert every_kill(lambda: write("new"), lambda: write("old"), check) >= 10
    assert seen == {"old", "new"}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_file_of_one_answer_that_cannot_be_written_leaves_all_three_old(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, calls, write = "abc", [], Path.write_bytes
    replace_together({tmp_path / name: b"old" for name in names})

    def full(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == fails_at:
            write(path, data[:1])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        replace_together({tmp_path / name: b"new" for name in names})
    assert digests(tmp_path).keys() == set(names)
    assert {(tmp_path / name).read_bytes() for name in names} == {b"old"}


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(IsADirectoryError):
        replace_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_asks_for_the_end_is_heard(number: signal.Signals, tmp_path: Path) -> None:
    """SIGHUP, as of a terminal that is closed, once ended the process on the spot and left what was unfinished."""

    def run() -> None:
        with whole_folder(tmp_path / "set") as unfinished:
            unfinished.mkdir()
            signal.raise_signal(number)

    def program() -> None:
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        try:
            start(run)
        except SystemExit as end:
            os._exit(end.code)  # type: ignore[arg-type]

    assert in_child(program) == 128 + number
    assert os.listdir(tmp_path) == []


def test_nohup_keeps_a_run_alive() -> None:
    def program() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        start(lambda: signal.raise_signal(signal.SIGHUP))

    assert in_child(program) == SURVIVED


def test_a_closed_terminal_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    done = interrupt_at("Image 100", "synth", tmp_path / "set", "--images", "120", "--size", "32", by=signal.SIGHUP)
    assert done.returncode == 129
    assert done.stderr.rstrip().endswith("Interrupted; nothing was left half-written.")
    assert os.listdir(tmp_path) == []
