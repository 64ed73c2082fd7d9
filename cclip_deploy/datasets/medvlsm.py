"""MedVLSM's layout: images, masks, and one JSON list a split, with up to ten prompts for each mask."""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cclip_deploy.common.json_file import read_json
from cclip_deploy.common.paths import check_inside
from cclip_deploy.datasets.sample import SPLITS, Sample, check_sizes, subject_of
from cclip_deploy.errors import DataError


def has_medvlsm(folder: Path) -> bool:
    """Whether a folder has MedVLSM's layout."""
    return any((folder / "anns" / f"{split}.json").is_file() for split in SPLITS)


def read_medvlsm(folder: Path, subject_pattern: str | None = None, allow_outside: bool = False) -> list[Sample]:
    """Read `images/`, `masks/` and `anns/{train,val,test}.json`, lists of `{img_name, mask_name, prompts}`.

    `prompts` maps p0, p1, … to a text or a list of texts. Every key gives a row, in order; an empty text (p0) gives
    none. Of a list one text is picked by a checksum of names, the same at every reading. A text that two keys of one
    entry share counts once. An image may have several entries, each with another mask and other texts.

    Raises:
        DataError: a file that is no such list, an entry without prompts, a missing file, one outside `images/` or
            `masks/` (unless `allow_outside`), a mask of another size than its image, one text for two masks of one
            image.
    """
    samples: list[Sample] = []
    for split in SPLITS:
        annotations = folder / "anns" / f"{split}.json"
        if annotations.is_file():
            samples += _read_split(folder, annotations, split, subject_pattern, allow_outside)
    return samples


def _read_split(
    folder: Path, annotations: Path, split: str, subject_pattern: str | None, allow_outside: bool
) -> Iterator[Sample]:
    seen: dict[tuple[str, str], str] = {}
    for number, entry in enumerate(_read_entries(annotations), 1):
        where = f"{annotations}, entry {number}"
        image_name, mask_name = (_read_name(entry, key, where) for key in ("img_name", "mask_name"))
        image = check_inside(folder / "images", image_name, where, allow_outside)
        mask = check_inside(folder / "masks", mask_name, where, allow_outside)
        check_sizes(image, mask, where)
        for text in _read_prompts(entry, image_name, where):
            first = seen.setdefault((image_name, text), where)
            if first != where:
                raise DataError(f"{where}: {image_name} has the text {text!r} in {first} too. Keep one.")
            yield Sample(image, mask, text, split, subject_of(image_name, subject_pattern))


def _read_entries(annotations: Path) -> list[Any]:
    entries = read_json(annotations)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{annotations} holds no list of entries. Each has img_name, mask_name and prompts.")
    return entries


def _read_name(entry: Any, key: str, where: str) -> str:
    name = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {key} is {reprlib.repr(name)}, where a file's name is expected. Correct it.")
    return name


def _read_prompts(entry: Any, image_name: str, where: str) -> list[str]:
    """The texts of an entry, one for each key that has one."""
    prompts = entry.get("prompts")
    if not isinstance(prompts, dict):
        raise DataError(
            f"{where}: prompts is {reprlib.repr(prompts)}, where p0, p1, ... with texts are expected. Correct it."
        )
    texts = [_pick(prompts[key], f"{image_name}/{key}", f"{where}: prompt {key}") for key in sorted(prompts, key=_rank)]
    filled = list(dict.fromkeys(text for text in texts if text))
    if not filled:
        raise DataError(f"{where}: {image_name} has no prompt but empty ones. Give one, or remove the entry.")
    return filled


def _rank(key: str) -> tuple[int, str]:
    """p2 before p10."""
    return len(key), key


def _pick(value: Any, salt: str, where: str) -> str:
    choices = value if isinstance(value, list) else [value]
    if not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where} is {reprlib.repr(value)}, where a text or a list of texts is expected. Correct it.")
    filled = [choice.strip() for choice in choices if choice.strip()]
    return filled[zlib.crc32(salt.encode()) % len(filled)] if filled else ""
