"""Read MedVLSM's layout: folders of images and masks, and a JSON list per split with several prompts for each mask."""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cclip_deploy.common.json_file import read_json
from cclip_deploy.common.paths import check_inside
from cclip_deploy.datasets.options import DETECTED, DataSetOptions
from cclip_deploy.datasets.read_log import ReadLog
from cclip_deploy.datasets.sample import SPLITS, Sample, check_sizes, subject_of
from cclip_deploy.errors import DataError


def has_medvlsm(folder: Path) -> bool:
    """Return whether a folder has MedVLSM's layout."""
    return any((folder / "anns" / f"{split}.json").is_file() for split in SPLITS)


def read_medvlsm(folder: Path, options: DataSetOptions = DETECTED, log: ReadLog | None = None) -> list[Sample]:
    """Read `images/`, `masks/` and `anns/{train,val,test}.json`, lists of `{img_name, mask_name, prompts}`.

    `prompts` maps p0, p1, … to a text or a list of texts. Every key gives one row, in order, except for empty texts
    (p0). From a list, one text is chosen by a checksum of names, so that reading is reproducible. Repeated texts in an
    entry are dropped. An image may have several entries with different masks and texts.

    Raises:
        DataError: a file is not such a list, an entry has no prompts, a file is missing or outside `images/` or
            `masks/` (unless `allow_outside`), a mask has another size than its image, or two masks of an image have the
            same text.
    """
    samples: list[Sample] = []
    for split in SPLITS:
        annotations = folder / "anns" / f"{split}.json"
        if annotations.is_file():
            samples += _read_split(folder, annotations, split, options)
    return samples


def _read_split(folder: Path, annotations: Path, split: str, options: DataSetOptions) -> Iterator[Sample]:
    seen: dict[tuple[str, str], str] = {}
    for number, entry in enumerate(_read_entries(annotations), 1):
        where = f"{annotations}, entry {number}"
        image_name, mask_name = (_read_name(entry, key, where) for key in ("img_name", "mask_name"))
        image = check_inside(folder / "images", image_name, where, options.allow_outside)
        mask = check_inside(folder / "masks", mask_name, where, options.allow_outside)
        check_sizes(image, mask, where)
        for text in _read_prompts(entry, image_name, where):
            first = seen.setdefault((image_name, text), where)
            if first != where:
                raise DataError(f"{where}: {image_name} has the text {text!r} in {first} too. Keep one.")
            subject = subject_of(image_name, options.subject_pattern)
            yield Sample(image, mask, text, split, subject, options.mask_values)


def _read_entries(annotations: Path) -> list[Any]:
    entries = read_json(annotations)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{annotations} is not a list of entries. Each needs img_name, mask_name and prompts.")
    return entries


def _read_name(entry: Any, key: str, where: str) -> str:
    name = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {key} is {reprlib.repr(name)}; expected a file name. Correct it.")
    return name


def _read_prompts(entry: Any, image_name: str, where: str) -> list[str]:
    """Return the distinct texts of an entry, in the order of their keys."""
    prompts = entry.get("prompts")
    if not isinstance(prompts, dict):
        raise DataError(f"{where}: prompts is {reprlib.repr(prompts)}; expected an object with p0, p1, ... Correct it.")
    texts = [_pick(prompts[key], f"{image_name}/{key}", f"{where}: prompt {key}") for key in sorted(prompts, key=_rank)]
    filled = list(dict.fromkeys(text for text in texts if text))
    if not filled:
        raise DataError(f"{where}: {image_name} has only empty prompts. Give one, or remove the entry.")
    return filled


def _rank(key: str) -> tuple[int, str]:
    """Sort key that puts p2 before p10."""
    return len(key), key


def _pick(value: Any, salt: str, where: str) -> str:
    choices = value if isinstance(value, list) else [value]
    if not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where} is {reprlib.repr(value)}; expected a text or a list of texts. Correct it.")
    filled = [choice.strip() for choice in choices if choice.strip()]
    return filled[zlib.crc32(salt.encode()) % len(filled)] if filled else ""
