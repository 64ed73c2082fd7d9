"""Reading MedVLSM's layout: several prompts per mask, several masks per image, and error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cclip_deploy.datasets.medvlsm import read_medvlsm
from cclip_deploy.errors import DataError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Pictures of 8x6, and the entries given as anns/train.json."""
    for name in ("images/patient0001_2CH.png", "images/b.jpg", "masks/m1.png", "masks/m2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / name)
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / "masks/turned.png")
    (tmp_path / "anns").mkdir()

    def written(entries: Any, split: str = "train") -> Path:
        (tmp_path / "anns" / f"{split}.json").write_text(json.dumps(entries))
        return tmp_path

    return written


def entry(image: str = "b.jpg", mask: str = "m1.png", **prompts: Any) -> dict[str, Any]:
    return {"img_name": image, "mask_name": mask, "prompts": prompts, "sentences": "passed over"}


def test_every_key_with_a_text_is_a_row_in_order(write: Callable[..., Path]) -> None:
    prompts = {"p10": "ten", "p0": "", "p2": "two", "p1": "one", "p3": "two", "p4": ["", " "]}
    read = read_medvlsm(write([entry("patient0001_2CH.png", **prompts)]))
    assert [r.text for r in read] == ["one", "two", "ten"]
    assert {(r.image.name, r.mask.name, r.split, r.subject) for r in read} == {
        ("patient0001_2CH.png", "m1.png", "train", "patient0001")
    }


def test_of_a_list_one_text_is_picked_and_always_the_same(write: Callable[..., Path]) -> None:
    choices = [f"wording {n}" for n in range(5)]
    picked = []
    for image in ("b.jpg", "patient0001_2CH.png"):
        for key in ("p1", "p2", "p3"):
            folder = write([entry(image, **{key: choices})])
            (one,), (again,) = read_medvlsm(folder), read_medvlsm(folder)
            assert one == again
            picked.append(one.text)
    assert set(picked) <= set(choices)
    assert len(set(picked)) > 1


def test_an_image_may_have_several_masks_with_their_own_texts(write: Callable[..., Path]) -> None:
    folder = write([entry(p1="atrium"), entry(mask="m2.png", p1="ventricle")])
    write([entry(p1="atrium")], "test")
    read = read_medvlsm(folder)
    assert [(r.mask.name, r.text, r.split) for r in read] == [
        ("m1.png", "atrium", "train"), ("m2.png", "ventricle", "train"), ("m1.png", "atrium", "test"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "is not a list of entries"),
        ([], "is not a list of entries"),
        ([3], "entry 1: img_name is None"),
        ([{"img_name": "b.jpg", "prompts": {"p1": "x"}}], "entry 1: mask_name is None"),
        ([{"img_name": "b.jpg", "mask_name": "m1.png"}], "entry 1: prompts is None"),
        ([entry(p0="", p1=[])], r"entry 1: b\.jpg has only empty prompts"),
        ([entry(p1=3)], "entry 1: prompt p1 is 3"),
        ([entry(p1=["x", None])], "entry 1: prompt p1 is"),
        ([entry(p1="x"), entry("c.png", p1="x")], r"entry 2: image .*c\.png does not exist"),
        ([entry(mask="m9.png", p1="x")], r"entry 1: mask .*m9\.png does not exist"),
        ([entry(mask="turned.png", p1="x")], "entry 1: mask .* is 6x8 pixels, its image 8x6"),
        ([entry(p1="x"), entry(mask="m2.png", p2="x")], r"entry 2: b\.jpg has the text 'x' in .*entry 1 too"),
    ],
    ids=range(12),
)
def test_a_mistake_is_named_with_its_entry(write: Callable[..., Path], entries: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_medvlsm(write(entries))


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe[]"], ids=range(3))
def test_a_file_that_is_not_json_is_named(write: Callable[..., Path], content: bytes) -> None:
    folder = write([])
    (folder / "anns/train.json").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.json cannot be read as"):
        read_medvlsm(folder)
