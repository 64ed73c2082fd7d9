"""Short run of tests/attacks/long/flip_inputs.py: corrupted inputs give a result or one error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cclip_deploy.errors import CclipError
from tests.attacks.memory import within

flip_inputs = pytest.importorskip("tests.attacks.long.flip_inputs", reason="DICOM needs pydicom")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[flip_inputs.Input]]:
    folder = tmp_path_factory.mktemp("inputs")
    return folder, flip_inputs.inputs(folder)


def test_what_is_changed_is_sound_before(kinds: tuple[Path, list[flip_inputs.Input]]) -> None:
    """Else the changes would all be refused for one reason; a mask of many values is refused as a mask alone."""
    folder, inputs = kinds
    for kind in inputs:
        path = folder / f"sound{kind.suffix}"
        path.write_bytes(kind.content)
        if kind.read is flip_inputs._read_all:
            assert flip_inputs.read_image(path).pixels.size, kind.name
        else:
            kind.read(path)


def test_some_changes_of_every_kind_of_input_give_an_answer_or_an_error(tmp_path: Path) -> None:
    said = within(1500, lambda: flip_inputs.flip(600, 11, tmp_path).failures)
    assert said == "list: []"


def test_a_reader_that_lets_an_error_through_is_found(
    kinds: tuple[Path, list[flip_inputs.Input]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> None:
        if random.Random(path.read_bytes()).random() < 0.5:
            raise CclipError("as it should be")
        raise IndexError("as it should not be")

    bad = flip_inputs.Input("bad", ".x", b"abc", read)
    monkeypatch.setattr(flip_inputs, "inputs", lambda folder: [bad])
    monkeypatch.setattr(flip_inputs.tempfile, "gettempdir", lambda: str(tmp_path))
    outcome = flip_inputs.flip(20, 1, tmp_path)
    assert 0 < len(outcome.failures) < 20
    assert "IndexError as it should not be" in outcome.summary()
