"""Of two concurrent runs with the same output, the second is refused before it does any work.

Before: temporary names held the process id, which is 1 in every container. Two containers on one volume had one
folder between them, and the first to fail removed what the other was filling: `synth` published 94 of about 600 films
with exit code 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.bundle import bundle
from cclip_deploy.bundle.bundle import Bundle, edited_bundle, new_bundle
from cclip_deploy.common.files import restore_folder, scratch_folder, whole_file, whole_folder, writing_into
from cclip_deploy.common.json_file import write_json
from cclip_deploy.common.locks import unfinished_file
from cclip_deploy.errors import BundleError, EnvironmentIssue, UsageError
from tests.bundles import digests, linked_copy
from tests.cli.run import invoke

OTHER_RUN = r"is being written by another run \(process 1 on host .+, since 20.+ UTC\)"
DEAD = "0123456789abcdef"


@pytest.fixture
def containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)


@pytest.mark.usefixtures("containers")
def test_a_second_run_neither_works_nor_removes_what_the_first_is_writing(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "set") as first:
        first.mkdir()
        (first / "0.png").write_bytes(b"0")
        with pytest.raises(EnvironmentIssue, match=OTHER_RUN), whole_folder(tmp_path / "set"):
            pytest.fail("The block of the second run was entered.")
        (first / "1.png").write_bytes(b"1")
    assert digests(tmp_path).keys() == {"set/0.png", "set/1.png"}


def test_another_name_of_the_same_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        scratch_folder(tmp_path / "link"),
        pytest.raises(EnvironmentIssue, match="being written"),
        whole_folder(tmp_path / "x" / ".." / "real"),
    ):
        pytest.fail("The block of the second run was entered.")


@pytest.mark.usefixtures("containers")
@pytest.mark.parametrize(
    ("hold", "command"),
    [
        (scratch_folder, "synth OUT --images 5 --size 32"),
        (scratch_folder, "evaluate BUNDLE nowhere -o OUT"),
        (scratch_folder, "export nowhere.safetensors -o OUT"),
        (writing_into, "predict BUNDLE FILM --prompt lung -o OUT --threads 1"),
    ],
)
def test_each_command_says_so_and_ends_with_3(
    hold: Callable[[Path], AbstractContextManager[object]], command: str, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    """Inputs that do not exist are not even looked at: `evaluate` and `export` once worked first and wrote last."""
    Image.new("L", (40, 40)).save(tmp_path / "film.png")
    places = {"OUT": tmp_path / "out", "BUNDLE": tiny_bundle_path, "FILM": tmp_path / "film.png"}
    arguments = [str(places.get(word, word)) for word in command.split()]
    with hold(tmp_path / "out"):
        done = invoke(*arguments)
    assert done.exit_code == 3, done.output
    assert "out is being written by another run (process 1 on host " in done.stderr
    assert os.listdir(tmp_path) == ["film.png"]


def test_a_training_holds_its_folder(tmp_path: Path) -> None:
    from cclip_deploy.train.config import TrainConfig
    from cclip_deploy.train.run import RunOptions, train

    with writing_into(tmp_path / "run"), pytest.raises(EnvironmentIssue, match="being written"):
        train(TrainConfig(model="tiny"), tmp_path / "nowhere", tmp_path / "run", options=RunOptions(resume=True))


def test_of_two_edits_of_a_bundle_the_second_is_refused(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """Before, both ended well and the engines of one remained."""
    copy = linked_copy(tiny_bundle_path, tmp_path)
    first, same = Bundle.open(copy), Bundle.open(copy)
    with edited_bundle(first) as folder:
        (folder / "reports").mkdir()
        (folder / "reports" / "first").write_text("1")
        with pytest.raises(EnvironmentIssue, match="being written"), edited_bundle(same):
            pytest.fail("The block of the second run was entered.")
    with pytest.raises(BundleError, match="was replaced or changed since it was opened"), edited_bundle(same):
        pytest.fail("The block of the second run was entered.")
    with edited_bundle(Bundle.open(copy)) as folder:
        (folder / "reports" / "second").write_text("2")
    assert {"reports/first", "reports/second"} <= Bundle.open(copy).sums.keys()
    assert os.listdir(tmp_path) == [copy.name]


def test_a_bundle_that_another_run_has_just_finished_is_not_replaced(
    tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is looked at again under the lock: it was free when the second of two exports began."""

    @contextmanager
    def after_the_other(path: Path) -> Iterator[Path]:
        linked_copy(tiny_bundle_path, tmp_path)
        with whole_folder(path) as unfinished:
            yield unfinished

    monkeypatch.setattr(bundle, "whole_folder", after_the_other)
    with pytest.raises(UsageError, match="exists already"), new_bundle(tmp_path / "copy.cclip"):
        pytest.fail("The block of the second run was entered.")


@pytest.mark.parametrize("held", [True, False])
def test_only_what_no_run_holds_is_a_leftover(held: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with unfinished_file(path) as other:
        left = tmp_path / f".run.json.{DEAD}.unfinished"
        left.write_text("half")
        with whole_file(path) as mine:
            mine.write_text("{}")
        assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_leftovers_of_other_targets_stay(tmp_path: Path) -> None:
    """`.a.b.…` belongs to a target a.b, whose run may be alive; names of other programs are theirs."""
    others = [f".a.b.{DEAD}.unfinished", ".a.1234.unfinished", ".a.unfinished", f".b.{DEAD}.unfinished"]
    for name in [*others, f".a.{DEAD}.unfinished"]:
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "a") as unfinished:
        unfinished.mkdir()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a"])


def test_a_lock_file_that_nobody_holds_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".a.cclip-lock").write_text("process 1 on host gone, since 2020-01-01 00:00:00 UTC")
    with whole_folder(tmp_path / "a") as unfinished:
        unfinished.mkdir()
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_file_that_is_a_link_does_not_lead_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.cclip-lock").symlink_to(tmp_path / "precious")
    with pytest.raises(EnvironmentIssue, match="could not be written"), whole_folder(tmp_path / "a"):
        pytest.fail("The link was followed.")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """`bench -o /dev/null`, run as root in a container, must not put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a device or pipe"):
        write_json(tmp_path / "pipe", {})
    assert not (tmp_path / "pipe").is_file()


def test_a_folder_that_was_moved_away_and_not_replaced_is_back_when_it_is_read(
    tiny_bundle_path: Path, tmp_path: Path
) -> None:
    copy = linked_copy(tiny_bundle_path, tmp_path)
    copy.rename(tmp_path / f".{copy.name}.{DEAD}.old")
    (tmp_path / f".{copy.name}.{DEAD}.unfinished").mkdir()
    assert Bundle.open(copy).check_all() == ()
    assert os.listdir(tmp_path) == [copy.name]
    restore_folder(tmp_path / "no" / "such" / "place")


class Films:
    """Two patients' films of the same file name, and what predict answers on them."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.bundle, self.folder, self.out = bundle, folder, folder / "out"
        for patient in ("one", "two"):
            (folder / patient).mkdir()
            Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(folder / patient / "film.png")

    def predict(self, patient: str, *more: str) -> tuple[int, str]:
        done = invoke(
            "predict", self.bundle, self.folder / patient / "film.png", "--prompt", "lung", "-o", self.out,
            "--threads", "1", "--index", "none", *more,
        )  # fmt: skip
        return done.exit_code, done.stderr


def test_masks_of_another_patient_are_not_replaced_silently(tiny_bundle_path: Path, tmp_path: Path) -> None:
    """Both films are film.png, so both masks are film-lung-mask.png: the second run once replaced the first's."""
    films = Films(tiny_bundle_path, tmp_path)
    assert films.predict("one")[0] == 0
    masks = digests(films.out)
    code, said = films.predict("two")
    assert code == 2
    assert "film-lung-mask.png exists and is of another image" in said
    assert "--force" in said
    assert digests(films.out) == masks
    assert films.predict("one")[0] == 0
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "film.png").write_bytes((tmp_path / "one" / "film.png").read_bytes())
    assert films.predict("copy")[0] == 0, "the same picture may be anywhere"
    assert digests(films.out) == masks
    assert films.predict("two", "--force")[0] == 0
    assert digests(films.out) != masks
    assert films.predict("one")[0] == 2


def test_a_mask_that_does_not_say_of_what_it_is_is_not_replaced(tiny_bundle_path: Path, tmp_path: Path) -> None:
    films = Films(tiny_bundle_path, tmp_path)
    films.out.mkdir()
    Image.new("L", (40, 40)).save(films.out / "film-lung-mask.png")
    code, said = films.predict("one")
    assert code == 2
    assert "does not contain the hash of its image" in said
    assert os.listdir(films.out) == ["film-lung-mask.png"]


def test_a_json_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench -o` once wrote into the file itself, and left half of it on a full disk."""
    write_json(tmp_path / "a.json", {"a": 1})
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:3], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EnvironmentIssue, match="The disk is full"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
