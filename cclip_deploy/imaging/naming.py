"""Names of output files, made of the names of images and the words of prompts."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cclip_deploy.imaging.reading import image_stem

_IMAGE_SLUG, _PROMPT_SLUG, _HASH = 60, 40, 8


def image_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each image: its file name without suffix.

    Where file names of different folders are equal (or become so in `file_stem`), as many folders as tell the images
    apart come first: "a-film" and "b-film" for `a/film.png` and `b/film.png`.
    """
    places = {path: Path(os.path.abspath(path)).parts for path in paths}
    depths = dict.fromkeys(paths, 1)
    while True:
        sharing: defaultdict[str, list[Path]] = defaultdict(list)
        for path, parts in places.items():
            sharing[_slug(_name(parts, depths[path]), r"[^\w.]+").casefold()].append(path)
        deeper = [
            path
            for group in sharing.values()
            if len({places[path][:-1] for path in group}) > 1
            for path in group
            if depths[path] < len(places[path])
        ]
        if not deeper:
            return {path: _name(parts, depths[path]) for path, parts in places.items()}
        for path in deeper:
            depths[path] += 1


def _name(parts: Sequence[str], depth: int) -> str:
    return "-".join([*parts[len(parts) - depth : -1], image_stem(parts[-1])])


def file_stem(image_path: Path, prompt: str, used: set[str], name: str | None = None) -> str:
    """Return a short, portable file-name stem of letters, digits, '.', '_' and '-' for an image and a prompt.

    A hash of path and prompt is appended if either had to be shortened or has no Latin letter, or if the stem is in
    `used`. The new stem is added, case-folded, to `used`. The same calls in the same order give the same stems.

    Args:
        image_path: the image.
        prompt: the prompt.
        used: stems given out before.
        name: of the image, from `image_names`; None is its file name.
    """
    name = image_stem(image_path.name) if name is None else name
    image_slug, prompt_slug = _slug(name, r"[^\w.]+"), _slug(prompt.lower(), r"\W+")
    cut = len(image_slug) > _IMAGE_SLUG or len(prompt_slug) > _PROMPT_SLUG or not (image_slug and prompt_slug)
    parts = [image_slug[:_IMAGE_SLUG].rstrip("-."), prompt_slug[:_PROMPT_SLUG].rstrip("-")]
    plain = "-".join(part for part in parts if part)
    digest = hashlib.sha256(f"{image_path.as_posix()}\0{prompt}".encode(errors="surrogatepass")).hexdigest()[:_HASH]
    hashed = f"{plain}-{digest}" if plain else digest
    stem, count = hashed if cut else plain, 1
    while stem.casefold() in used:
        stem = hashed if count == 1 else f"{hashed}-{count}"
        count += 1
    used.add(stem.casefold())
    return stem


def _slug(text: str, separators: str) -> str:
    latin = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(separators, "-", latin).strip("-.")
