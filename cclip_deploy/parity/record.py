"""Record reference answers: sentences and raw pictures through open_clip, the trained preprocessing and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cclip_deploy.bundle.manifest import Manifest
from cclip_deploy.datasets.synthetic.generator import MIN_SIDE_PX, make_sample
from cclip_deploy.imaging.preprocess import resize_pixels, to_input
from cclip_deploy.imaging.reading import read_image
from cclip_deploy.parity.compare import useful
from cclip_deploy.parity.reference import PICTURE_PROMPTS, SEED, SHORTEST_PROMPT, Reference, record, seeded_inputs
from cclip_deploy.parity.source import TRAINED_PREPROCESSING, open_clip_ids, pack_pixels, record_source, unpack_pixels
from cclip_deploy.prompts.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from cclip_deploy.runtime.pytorch import PyTorchBackend

Progress = Callable[[str], None]
Array = NDArray[np.generic]
Floats = NDArray[np.float32]

DRAWINGS, PROMPTS_KEPT = 3, 2
LARGEST = 4
FURTHER_PROMPTS = (
    "Unilateral pulmonary infection, one infected area, lower right lung.",
    "Unilateral pulmonary infection, one infected area, upper left lung.",
    "Bilateral pulmonary infection, two infected areas, all left lung and all right lung.",
)


@dataclass(frozen=True)
class _Asked:
    """Raw pictures and prompts, and PyTorch's logits of all pairs."""

    prompts: tuple[str, ...]
    tokens: NDArray[np.int64]  # (P, L)
    pictures: tuple[Array, ...]
    image: Floats  # (B, 3, H, W)
    logits: Floats  # (B, P, H, W)

    def with_prompts(self, columns: Sequence[int]) -> _Asked:
        """These prompts alone."""
        chosen = list(columns)
        prompts = tuple(self.prompts[column] for column in chosen)
        return _Asked(prompts, self.tokens[chosen], self.pictures, self.image, self.logits[:, chosen])

    def useful(self) -> NDArray[np.bool_]:
        return useful(self.logits)


def make_references(
    network: PyTorchBackend,
    manifest: Manifest,
    pictures: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    on_progress: Progress = lambda _: None,
) -> list[Reference]:
    """The references of a bundle: `seeded` noise, and `pictures` from sentences and raw pictures to masks.

    Of the manifest, only the sizes and the names of the graphs are read. Where no pictures or prompts are given, some
    are drawn, and those are kept whose masks cover between 2 % and 98 % of their picture, as far as there are any.

    Raises:
        ImageError: a picture cannot be read.
        PromptError: a prompt is empty or too long.
    """
    graphs, image_hw = tuple(manifest.graphs), manifest.image_hw
    on_progress("Asking PyTorch for reference answers (pictures)")
    asked = _choose(network, manifest, pictures, prompts)
    source = record_source(asked.prompts, asked.pictures, asked.logits, image_hw)
    on_progress("Asking PyTorch for reference answers (seeded)")
    seeded = record("seeded", network, *seeded_inputs(image_hw, manifest.prompt_length), graphs)
    return [seeded, record("pictures", network, asked.image, asked.tokens, graphs, (source, asked.logits))]


def _choose(network: PyTorchBackend, manifest: Manifest, pictures: Sequence[Path], prompts: Sequence[str]) -> _Asked:
    tokenizer = PromptTokenizer.from_open_clip()
    given = tuple(_raw(read_image(path).pixels, manifest.image_hw) for path in pictures)
    best: _Asked | None = None
    for raw, own_prompts in [(given, ())] if given else _drawings(manifest.image_hw):
        texts = tuple(prompts) or _fitting((*own_prompts, *PICTURE_PROMPTS, *FURTHER_PROMPTS), tokenizer, manifest)
        asked = _ask(network, manifest, tokenizer, texts, raw)
        if not prompts:
            asked = asked.with_prompts(_most_useful(asked.useful()))
        if best is None or asked.useful().sum() > best.useful().sum():
            best = asked
        if best.useful().all():
            break
    assert best is not None  # there is at least one set of pictures
    return best


def _raw(pixels: Floats, image_hw: tuple[int, int]) -> Array:
    """A picture as a reference keeps it: of a larger one, at most `LARGEST` times the network's size, in 16 bits."""
    hw = (min(pixels.shape[0], LARGEST * image_hw[0]), min(pixels.shape[1], LARGEST * image_hw[1]))
    if hw == pixels.shape[:2]:
        return pack_pixels(pixels)
    reduced = np.rint(resize_pixels(pixels, hw, TRAINED_PREPROCESSING) * 65535).astype(np.uint16)  # (1 or 3, h, w)
    return reduced[0] if len(reduced) == 1 else np.ascontiguousarray(np.moveaxis(reduced, 0, -1))


def _ask(
    network: PyTorchBackend,
    manifest: Manifest,
    tokenizer: PromptTokenizer,
    texts: tuple[str, ...],
    raw: tuple[Array, ...],
) -> _Asked:
    length = manifest.prompt_length
    for text in texts:
        tokenizer.encode(text, length)  # a PromptError where it is empty or too long
    tokens = open_clip_ids(texts)[:, :length]
    inputs = [to_input(unpack_pixels(picture), manifest.image_hw, TRAINED_PREPROCESSING) for picture in raw]
    image = np.concatenate(inputs)
    return _Asked(texts, tokens, raw, image, network.all_pairs(image, tokens))


def _fitting(texts: Sequence[str], tokenizer: PromptTokenizer, manifest: Manifest) -> tuple[str, ...]:
    fitting = (text for text in texts if len(tokenizer.ids(text)) <= manifest.prompt_length)
    return tuple(dict.fromkeys(fitting)) or (SHORTEST_PROMPT,)


def _most_useful(found: NDArray[np.bool_]) -> tuple[int, ...]:
    """The prompts, few, with the most useful masks over all pictures; the first of equals."""
    count = min(PROMPTS_KEPT, found.shape[1])
    return max(combinations(range(found.shape[1]), count), key=lambda columns: int(found[:, columns].sum()))


def _drawings(image_hw: tuple[int, int]) -> Iterator[tuple[tuple[Array, ...], tuple[str, ...]]]:
    """Pairs of synthetic radiographs of other sizes than the network's, larger and smaller, with their own prompts."""
    height, width = image_hw
    sizes = ((height * 3 // 2, width * 5 // 4), (height * 3 // 4, width * 2 // 3))
    for number in range(DRAWINGS):
        films = [
            make_sample(np.random.default_rng(SEED + 2 * number + place), (max(MIN_SIDE_PX, h), max(MIN_SIDE_PX, w)))
            for place, (h, w) in enumerate(sizes)
        ]
        gray, smaller = (film.image for film in films)
        tinted = np.stack([smaller, smaller * 0.95, smaller * 0.9 + 0.05], axis=-1)
        pictures = tuple(np.rint(values * 255).astype(np.uint8) for values in (gray, tinted))
        yield pictures, tuple(film.prompt for film in films)
